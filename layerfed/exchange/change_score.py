"""FedTLU's score of a layer's change [T], for the server's choice and for the client's.

    Score(l) = ‖ΔW_l‖ / (√n_l · std(ΔW_l))

n_l is the number of the layer's elements. *The formula is from a secondary source*: of [T] (Park and
Joe-Wong, FedTLU, arXiv 2412.17692) only the abstract and summaries by others could be read. With the L2
norm the score is √(1 + (mean/std)²), which is large if a layer moves as a whole rather than as noise.
With the L1 norm it is √n_l · mean|ΔW_l| / std(ΔW_l), which favours larger layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

__all__ = ["Norm", "change_score", "count_of", "highest"]

Norm = Literal["l1", "l2"]


def change_score(changes: Iterable[np.ndarray], norm: Norm = "l2") -> float:
    """Return the score of one layer's change; every positive multiple of it has the same score.

    Parameters
    ----------
    changes : Iterable[numpy.ndarray]
        ΔW_l, the change of each of the layer's parameters, in any shapes.
    norm : {"l1", "l2"}

    Returns
    -------
    float
        0 for a layer without a change; infinity if all elements changed by the same amount.
    """
    parts = [np.asarray(change, dtype=np.float64).ravel() for change in changes]
    largest = max((float(np.abs(part).max(initial=0.0)) for part in parts), default=0.0)
    if largest == 0.0:
        return 0.0
    # Relative to the largest element, since squares of tiny changes would vanish.
    values = np.concatenate(parts) / largest
    size = np.sqrt(values @ values) if norm == "l2" else np.abs(values).sum()
    with np.errstate(divide="ignore"):
        return float(size / np.sqrt(values.size) / values.std())


def count_of(fraction: float, layers: int) -> int:
    """Return the number of layers in a fraction: the nearest whole number, at least one."""
    return min(layers, max(1, int(fraction * layers + 0.5)))


def highest(scores: Mapping[str, float], count: int) -> list[str]:
    """Return the layers with the highest scores, in their own order; ties go to earlier layers."""
    order = sorted(scores, key=lambda layer: -scores[layer])[:count]
    return [layer for layer in scores if layer in order]
