"""Mask-weighted averaging, layer by layer, as replies arrive (eqs. 5-7).

θ_l ← θ_l + Σ_i w_{i,l} Δ_{i,l}   with   w_{i,l} = d_i m_i(l) / Σ_{j∈S_t} d_j m_j(l)

A reply is folded in and can be dropped at once, so the server holds one float64 sum of the trained
layers whatever the number of clients, and the weights need not be known before the last reply. The order
in which replies arrive moves such a sum by 10⁻¹⁶ of its size: in the float32 model that is at most the
rounding of the last bit, and in nearly every element nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from layerfed.layers import LayerMap

__all__ = ["MaskedMean"]

PIECE = 2**15


class MaskedMean:
    """The weighted mean update of each layer over the clients that trained it.

    Parameters
    ----------
    layers : LayerMap
        How the model falls into layers.
    """

    def __init__(self, layers: LayerMap) -> None:
        self._layers = layers
        self._sums: dict[str, np.ndarray] = {}
        self._term = np.empty(PIECE)
        self.weights: dict[str, int] = {}
        """Σ d_j over the clients that trained each layer."""

    def add(
        self, trained: Iterable[str], update: Mapping[str, np.ndarray], examples: int
    ) -> dict[str, float]:
        """Fold in one client's update; return ‖Δ_{i,l}‖² of each layer, over its parameters.

        Parameters
        ----------
        trained : Iterable[str]
            Names of the layers this client trained, the head included.
        update : Mapping[str, numpy.ndarray]
            Δ_i of every tensor of those layers.
        examples : int
            d_i, the client's number of training examples.
        """
        norms = {}
        for layer in trained:
            self.weights[layer] = self.weights.get(layer, 0) + examples
            parameters, square = set(self._layers[layer].parameters), 0.0
            for name in self._layers[layer].tensors:
                if name not in self._sums:
                    self._sums[name] = np.zeros(update[name].shape)
                total, delta = self._sums[name].reshape(-1), update[name].reshape(-1)
                norm_sq = self._add(total, delta, examples)
                square += norm_sq if name in parameters else 0.0
            norms[layer] = square / examples**2
        return norms

    def _add(self, total: np.ndarray, delta: np.ndarray, examples: int) -> float:
        """Add d_i·Δ to a sum, a piece at a time, so that the product never leaves the processor's cache.

        Returns its squared norm.
        """
        norm_sq = 0.0
        for start in range(0, total.size, PIECE):
            piece = delta[start : start + PIECE]
            term = self._term[: piece.size]
            # Exact in float64: 24 bits of mantissa times at most 29 bits of count.
            np.multiply(piece, examples, out=term, dtype=np.float64)
            total[start : start + PIECE] += term
            # Not BLAS: it would wake threads for a piece this small.
            norm_sq += float(np.einsum("i,i->", term, term))
        return norm_sq

    def changes(self, layer: str) -> list[np.ndarray]:
        """Return the mean update of a layer's parameters, *times* `weights[layer]`, without a copy."""
        return [self._sums[name] for name in self._layers[layer].parameters]

    def norm_sq(self, layer: str) -> float:
        """Return ‖Σ_i w_{i,l} Δ_{i,l}‖² over a layer's parameters."""
        square = sum(float(np.vdot(change, change)) for change in self.changes(layer))
        return square / self.weights[layer] ** 2

    def pop(self, layer: str) -> dict[str, np.ndarray]:
        """Return a layer's mean update by tensor, Σ_i w_{i,l} Δ_{i,l} in float64, and forget its sum."""
        means = {}
        for name in self._layers[layer].tensors:
            means[name] = self._sums.pop(name)
            means[name] /= self.weights[layer]
        return means
