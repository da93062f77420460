"""Clipping against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerfed.exchange.clipping import clipped, norm_of
from tests.updates import UPDATES


@given(UPDATES, st.floats(1e-3, 1e3))
def test_no_norm_exceeds_the_bound_and_the_direction_stays(
    update: dict[str, np.ndarray], bound: float
) -> None:
    whole = np.concatenate([v.ravel().astype(np.float64) for v in update.values()])
    scaled, norm = clipped(update, bound)
    assert norm == pytest.approx(np.linalg.norm(whole))
    assert norm_of(scaled) <= bound * (1 + 1e-5)
    after = np.concatenate([scaled[name].ravel().astype(np.float64) for name in update])
    np.testing.assert_allclose(after, whole * min(1.0, bound / max(norm, 1e-300)), 1e-5, 1e-37)
    assert all(scaled[name].dtype == update[name].dtype for name in update)


def test_what_is_within_the_bound_is_not_copied() -> None:
    update = {"a": np.ones(4, np.float32)}
    assert clipped(update, 2.0) == (update, 2.0)
    assert clipped(update, 2.0)[0] is update


def test_integer_tensors_neither_count_nor_change() -> None:
    update = {"a": np.full(4, 3.0, np.float32), "batches": np.array([7])}
    scaled, norm = clipped(update, 1.0)
    assert norm == 6.0
    assert scaled["batches"] is update["batches"]
