"""FedTLU's score of how much a layer has changed [T]; the server's choice and the client's alike.

    Score(l) = ‖ΔW_l‖ / (√n_l · std(ΔW_l))

with n_l the number of the layer's elements. *The formula is from a secondary source*: of [T] (Park and
Joe-Wong, FedTLU, arXiv 2412.17692) only the abstract and summaries by others could be read. With the L2
norm it is √(1 + (mean/std)²): large where a layer moves as a whole rather than as noise. With the L1
norm it is √n_l · mean|ΔW_l| / std(ΔW_l), which favours larger layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

__all__ = ["Norm", "change_score", "count_of", "highest"]

Norm = Literal["l1", "l2"]


def change_score(changes: Iterable[np.ndarray], norm: Norm = "l2") -> float:
    """Score one layer's change; the same for any positive multiple of it.

    Parameters
    ----------
    changes : Iterable[numpy.ndarray]
        ΔW_l: the change of each of the layer's parameters, of any shapes.
    norm : {"l1", "l2"}

    Returns
    -------
    float
        0 for a layer that has not changed; infinite where all elements changed alike.
    """
    parts = [np.asarray(change, dtype=np.float64).ravel() for change in changes]
    largest = max((float(np.abs(part).max(initial=0.0)) for part in parts), default=0.0)
    if largest == 0.0:
        return 0.0
    # Relative to the largest element: squares of tiny changes would vanish.
    values = np.concatenate(parts) / largest
    size = np.sqrt(values @ values) if norm == "l2" else np.abs(values).sum()
    with np.errstate(divide="ignore"):
        return float(size / np.sqrt(values.size) / values.std())


def count_of(fraction: float, layers: int) -> int:
    """Return how many of some layers a fraction is: the nearest whole number, at least one."""
    return min(layers, max(1, int(fraction * layers + 0.5)))


def highest(scores: Mapping[str, float], count: int) -> list[str]:
    """Return the highest-scored layers, in their own order; ties go to those that come first."""
    order = sorted(scores, key=lambda layer: -scores[layer])[:count]
    return [layer for layer in scores if layer in order]
