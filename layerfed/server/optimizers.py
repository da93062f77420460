"""Server optimisers: from the mean update of a layer to its new version.

The mean update Δ_l plays the part of a negative gradient [Reddi et al., Adaptive Federated Optimization,
2021]. State is kept per tensor of each layer and moves only in rounds in which somebody trained the
layer; a layer nobody selected stays bit-identical, momentum or not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np

from layerfed.models.layers import Layer

__all__ = ["SERVER_OPTIMIZERS", "ServerOptimizer"]


class ServerOptimizer(ABC):
    """Turns mean updates into steps.

    Parameters
    ----------
    lr : float (default: 1.0)
        η_s, the server's learning rate.
    momentum : float (default: 0.9)
        β₁ of the optimisers that have one.
    beta2 : float (default: 0.99)
        β₂ of the adaptive ones.
    tau : float (default: 1e-3)
        τ, their adaptivity: added to the root of the second moment.
    """

    moments: tuple[str, ...] = ()
    """Names of the running means it keeps of each tensor."""

    def __init__(
        self, lr: float = 1.0, momentum: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
    ) -> None:
        self.lr, self.momentum, self.beta2, self.tau = lr, momentum, beta2, tau
        self.state: dict[str, dict[str, np.ndarray]] = {name: {} for name in self.moments}
        """{moment: {tensor: float32 array}}, empty until a tensor is first stepped."""

    def step(
        self, layer: Layer, tensors: Mapping[str, np.ndarray], mean: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Return a layer's new tensors, in their own dtypes.

        Parameters
        ----------
        layer : Layer
        tensors : Mapping[str, numpy.ndarray]
            θ^t_l.
        mean : Mapping[str, numpy.ndarray]
            Σ_i w_{i,l} Δ_{i,l}, float64. Buffers (BatchNorm's statistics) get it whatever the
            optimiser, integer ones rounded.
        """
        stepped = {}
        for name, tensor in tensors.items():
            trained = name in layer.parameters
            value = tensor + (self.lr * self.direction(name, mean[name]) if trained else mean[name])
            if np.issubdtype(tensor.dtype, np.integer):
                value = np.rint(value)
            stepped[name] = value.astype(tensor.dtype)
        return stepped

    @abstractmethod
    def direction(self, name: str, mean: np.ndarray) -> np.ndarray:
        """Return what the learning rate is multiplied with, moving the tensor's state."""

    def _moment(self, moment: str, name: str, like: np.ndarray) -> np.ndarray:
        kept = self.state[moment].get(name)
        return np.zeros(like.shape) if kept is None else kept.astype(np.float64)

    def _keep(self, moment: str, name: str, value: np.ndarray) -> None:
        self.state[moment][name] = value.astype(np.float32)


class _SGD(ServerOptimizer):
    """FedAvg: θ ← θ + η_s Δ; with η_s = 1 that of the paper (eq. 7)."""

    def direction(self, name: str, mean: np.ndarray) -> np.ndarray:
        return mean


class _Momentum(ServerOptimizer):
    """FedAvgM: v ← β₁ v + Δ, θ ← θ + η_s v [Hsu et al., 2019]."""

    moments = ("first",)

    def direction(self, name: str, mean: np.ndarray) -> np.ndarray:
        value: np.ndarray = self.momentum * self._moment("first", name, mean) + mean
        self._keep("first", name, value)
        return value


class _Adaptive(ServerOptimizer):
    """m ← β₁ m + (1 − β₁) Δ, θ ← θ + η_s m / (√v + τ), with v as the subclass moves it."""

    moments = ("first", "second")

    def direction(self, name: str, mean: np.ndarray) -> np.ndarray:
        first = self.momentum * self._moment("first", name, mean) + (1 - self.momentum) * mean
        second = self._second(self._moment("second", name, mean), np.square(mean))
        self._keep("first", name, first)
        self._keep("second", name, second)
        direction: np.ndarray = first / (np.sqrt(second) + self.tau)
        return direction

    @abstractmethod
    def _second(self, second: np.ndarray, square: np.ndarray) -> np.ndarray: ...


class _Adam(_Adaptive):
    """FedAdam: v ← β₂ v + (1 − β₂) Δ²."""

    def _second(self, second: np.ndarray, square: np.ndarray) -> np.ndarray:
        moved: np.ndarray = self.beta2 * second + (1 - self.beta2) * square
        return moved


class _Yogi(_Adaptive):
    """FedYogi: v ← v − (1 − β₂) Δ² sign(v − Δ²)."""

    def _second(self, second: np.ndarray, square: np.ndarray) -> np.ndarray:
        moved: np.ndarray = second - (1 - self.beta2) * square * np.sign(second - square)
        return moved


SERVER_OPTIMIZERS: Mapping[str, type[ServerOptimizer]] = {
    "sgd": _SGD,
    "momentum": _Momentum,
    "adam": _Adam,
    "yogi": _Yogi,
}
