"""Pieces cover an array once, in order, and can be written through."""

from __future__ import annotations

import numpy as np
import pytest

from layerfed.exchange.pieces import pieces


@pytest.mark.parametrize("shape", [(), (0,), (1,), (4,), (5,), (3, 3), (2, 0, 3)])
def test_pieces_are_all_elements_in_order(shape: tuple[int, ...]) -> None:
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    found = list(pieces(values, 2))
    assert all(0 < piece.size <= 2 for piece in found)
    np.testing.assert_array_equal(np.concatenate([[], *found]), values.ravel())
    for piece in pieces(values, 2):
        piece += 1
    np.testing.assert_array_equal(values.ravel(), np.arange(values.size) + 1)


def test_an_array_in_another_order_is_read_in_rows() -> None:
    values = np.arange(6).reshape(2, 3).T
    assert [piece.tolist() for piece in pieces(values, 4)] == [[0, 3, 1, 4], [2, 5]]
