"""Iteration over large arrays in pieces, so that float64 copies stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

__all__ = ["pieces"]


def pieces(values: np.ndarray, size: int = 2**16) -> Iterator[np.ndarray]:
    """Yield an array's elements in order as flat views, `size` at a time.

    A view of an array that is not contiguous is a copy: it can be read, but not written through.
    """
    flat = values.reshape(-1)
    for start in range(0, flat.size, size):
        yield flat[start : start + size]
