"""Clipping: an update is scaled down as a whole if its norm exceeds a bound."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from layerfed.exchange.pieces import pieces

__all__ = ["clipped", "norm_of"]


def norm_of(update: Mapping[str, np.ndarray]) -> float:
    """Return the Euclidean norm over all floating-point tensors of an update, summed in float64."""
    square = 0.0
    for values in update.values():
        if not np.issubdtype(values.dtype, np.floating):
            continue
        for piece in pieces(values):
            wide = piece.astype(np.float64)
            square += float(np.einsum("i,i->", wide, wide))  # not BLAS and its threads
    return math.sqrt(square)


def clipped(
    update: Mapping[str, np.ndarray], bound: float
) -> tuple[Mapping[str, np.ndarray], float]:
    """Scale an update by min(1, C / ‖Δ‖), with the norm over all its tensors.

    Parameters
    ----------
    update : Mapping[str, numpy.ndarray]
        Δ_i by tensor. Integer tensors do not count in the norm and do not change.
    bound : float
        C, above 0.

    Returns
    -------
    tuple[Mapping[str, numpy.ndarray], float]
        The scaled update, or the same object if it is within the bound; and its norm before.
    """
    norm = norm_of(update)
    if norm <= bound:
        return update, norm
    factor = bound / norm
    scaled = {
        name: (values * values.dtype.type(factor))
        if np.issubdtype(values.dtype, np.floating)
        else values
        for name, values in update.items()
    }
    return scaled, norm
