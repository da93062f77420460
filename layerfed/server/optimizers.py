"""Server optimisers, which turn the mean update of a layer into the layer's new version.

The mean update Δ_l takes the place of a negative gradient [Reddi et al., Adaptive Federated
Optimization, 2021]. State is kept for each tensor and changes only in rounds in which a client trained
its layer. A layer that no client trained stays bit-identical, also with momentum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np

from layerfed.models.layers import Layer

__all__ = ["SERVER_OPTIMIZERS", "ServerOptimizer"]


class ServerOptimizer(ABC):
    """A rule that turns mean updates into steps.

    Parameters
    ----------
    lr : float (default: 1.0)
        η_s, the server's learning rate.
    momentum : float (default: 0.9)
        β₁ of momentum, adam and yogi.
    beta2 : float (default: 0.99)
        β₂ of adam and yogi.
    tau : float (default: 1e-3)
        τ of adam and yogi, which is added to the root of the second moment.
    """

    moments: tuple[str, ...] = ()
    """Names of the running means that the optimiser keeps of each tensor."""

    def __init__(
        self, lr: float = 1.0, momentum: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
    ) -> None:
        self.lr, self.momentum, self.beta2, self.tau = lr, momentum, beta2, tau
        self.state: dict[str, dict[str, np.ndarray]] = {name: {} for name in self.moments}
        """{moment: {tensor: float32 array}}, without entries for tensors that no step has changed."""

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
            Σ_i w_{i,l} Δ_{i,l}, float64. It is added to buffers (BatchNorm's statistics) under every
            optimiser, and rounded for integer ones.
        """
        stepped = {}
        for name, tensor in tensors.items():
            trained = name in layer.parameters
            value = tensor + (self.lr * self.direction(name, mean[name]) if trained else mean[name])
            if np.issubdtype(tensor.dtype, np.integer):
                value = np.rint(value)
            if name.endswith("running_var"):
                # Secure sums round, and a client may send anything; below zero the output is NaN.
                value = np.maximum(value, 0.0)
            stepped[name] = value.astype(tensor.dtype)
        return stepped

    @abstractmethod
    def direction(self, name: str, mean: np.ndarray) -> np.ndarray:
        """Return the step before it is scaled by the learning rate, and update the tensor's state."""

    def _moment(self, moment: str, name: str, like: np.ndarray) -> np.ndarray:
        kept = self.state[moment].get(name)
        return np.zeros(like.shape) if kept is None else kept.astype(np.float64)

    def _keep(self, moment: str, name: str, value: np.ndarray) -> None:
        self.state[moment][name] = value.astype(np.float32)


class _SGD(ServerOptimizer):
    """FedAvg: θ ← θ + η_s Δ, which is the paper's rule for η_s = 1 (eq. 7)."""

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
    """m ← β₁ m + (1 − β₁) Δ, θ ← θ + η_s m / (√v + τ), with v updated by the subclass."""

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
