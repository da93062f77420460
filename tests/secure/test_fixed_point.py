"""Updates as integers: the error is within the stated bound, and nothing overflows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerfed.secure.fixed_point import ROOM, FixedPoint


@given(
    st.lists(st.integers(1, 2**24), min_size=1, max_size=12),
    st.floats(1e-3, 1e4),
    st.integers(0, 2**16),
)
def test_the_mean_is_off_by_no_more_than_promised(
    examples: list[int], limit: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    point = FixedPoint.fitting(limit, sum(examples), len(examples))
    # The ends of the range among them, where all clients together come closest to an overflow.
    updates = [rng.uniform(-limit, limit, 20) for _ in examples]
    for update in updates:
        update[:2] = -limit, limit
    total = np.zeros(21, np.uint32)
    for update, count in zip(updates, examples, strict=True):
        vector, cut = point.encode([update[:7], update[7:].reshape(13, 1)], count)
        assert cut == 0
        total += vector
    mean, counted = point.decode(total, len(examples))
    assert counted == sum(examples)
    exact = np.average(updates, axis=0, weights=examples)
    rounding = 1e-12 * limit  # of float64, in `exact`
    assert np.abs(mean - exact).max() <= point.error(counted, len(examples)) + rounding


def test_half_of_the_room_is_used() -> None:
    """A scale twice as large would not fit."""
    for examples, clients, limit in ((3, 2, 1.0), (100_000, 100, 8.0), (2**30, 7, 0.3)):
        scale = FixedPoint.fitting(limit, examples, clients).scale
        assert scale * limit * examples + clients <= ROOM
        assert 2 * scale * limit * examples + clients > ROOM


def test_what_lies_beyond_the_range_is_clipped_and_counted() -> None:
    point = FixedPoint.fitting(1.0, 10, 1)
    vector, cut = point.encode([np.array([-3.0, -1.0, 0.5, 1.5, 1e30], np.float32)], 10)
    mean, _ = point.decode(vector, 1)
    np.testing.assert_allclose(mean, [-1, -1, 0.5, 1, 1], atol=1e-8)
    assert cut == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_refused_by_the_client(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or Inf"):
        FixedPoint(1.0, 1.0).encode([np.array([0.0, bad])], 1)


def test_a_scale_that_would_overflow_is_refused_by_the_client() -> None:
    with pytest.raises(ValueError, match="overflow"):
        FixedPoint(1.0, 2.0**28).encode([np.zeros(1)], 9)


def test_more_examples_than_can_be_counted_are_refused() -> None:
    with pytest.raises(ValueError, match="a secure sum counts to"):
        FixedPoint.fitting(1.0, 2**31, 4)


def test_whole_numbers_come_back_whole() -> None:
    point = FixedPoint.fitting(8.0, 7, 1)
    vector, _ = point.encode([np.array([2, -1], np.int64)], 7)
    assert point.decode(vector, 1)[0].tolist() == [2.0, -1.0]


def test_a_sum_beyond_the_range_is_refused() -> None:
    """One client can add what it likes to the sum; the mean of honest ones lies within the range."""
    point = FixedPoint.fitting(1.0, 20, 2)
    honest, _ = point.encode([np.array([1.0, -1.0])], 10)
    assert point.decode(honest + honest, 2)[0].tolist() == [1.0, -1.0]
    hostile = honest.copy()
    hostile[-1] = np.uint32(2**32 - 9)  # ten and minus nine examples
    with pytest.raises(ValueError, match=r"a coordinate of its mean is 20, and each"):
        point.decode(honest + hostile, 2)
