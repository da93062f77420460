"""Mask-weighted averaging, layer by layer, as replies arrive (eqs. 5-7).

θ_l ← θ_l + Σ_i w_{i,l} Δ_{i,l}   with   w_{i,l} = d_i m_i(l) / Σ_{j∈S_t} d_j m_j(l)

A reply is folded in and can be dropped at once, so the server holds one sum of the trained layers
whatever the number of clients, and the weights need not be known before the last reply.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from layerfed.layers import LayerMap

__all__ = ["MaskedMean"]


class _ExactSum:
    """A float64 sum with its rounding errors kept beside it (Knuth's TwoSum).

    Replies arrive in any order. With the errors kept, the order changes the total by about 2⁻¹⁰⁰ of
    its size, so the float32 model after a round is the same on every engine and on every run.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.total = np.zeros(shape)
        self.error = np.zeros(shape)

    def add(self, term: np.ndarray) -> None:
        total = self.total + term
        kept = total - self.total
        self.error += (self.total - (total - kept)) + (term - kept)
        self.total = total

    def value(self) -> np.ndarray:
        return self.total + self.error


class MaskedMean:
    """The weighted mean update of each layer over the clients that trained it.

    Parameters
    ----------
    layers : LayerMap
        How the model falls into layers.
    """

    def __init__(self, layers: LayerMap) -> None:
        self._layers = layers
        self._sums: dict[str, _ExactSum] = {}
        self.weights: dict[str, int] = {}
        """Σ d_j over the clients that trained each layer."""

    def add(self, trained: Iterable[str], update: Mapping[str, np.ndarray], examples: int) -> None:
        """Fold in one client's update.

        Parameters
        ----------
        trained : Iterable[str]
            Names of the layers this client trained, the head included.
        update : Mapping[str, numpy.ndarray]
            Δ_i of every tensor of those layers.
        examples : int
            d_i, the client's number of training examples.
        """
        for layer in trained:
            self.weights[layer] = self.weights.get(layer, 0) + examples
            for name in self._layers[layer].tensors:
                delta = update[name]
                if name not in self._sums:
                    self._sums[name] = _ExactSum(delta.shape)
                # d_i·Δ is exact in float64: 24 bits of mantissa times at most 29 bits of count.
                self._sums[name].add(delta.astype(np.float64) * examples)

    def apply(self, layer: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return a layer's new tensors, θ_l + Σ_i w_{i,l} Δ_{i,l}, in their own dtypes.

        Integer tensors (BatchNorm's batch counter) get the rounded mean.
        """
        updated = {}
        for name, tensor in tensors.items():
            mean = self._sums[name].value() / self.weights[layer]
            value = tensor.astype(np.float64) + mean
            if np.issubdtype(tensor.dtype, np.integer):
                value = np.rint(value)
            updated[name] = value.astype(tensor.dtype)
        return updated
