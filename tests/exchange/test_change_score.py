"""FedTLU's score against its formula, element by element."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerfed.exchange.change_score import change_score, count_of, highest

values = st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=12)


@given(values, values, st.sampled_from(["l1", "l2"]), st.sampled_from([1e-30, 1.0, 1e20]))
def test_it_is_the_formula_over_all_tensors_of_a_layer(
    one: list[float], two: list[float], norm: str, scale: float
) -> None:
    """‖ΔW‖ / (√n · std(ΔW)); a multiple of the change scores the same."""
    elements = [*one, *two]
    n, mean = len(elements), math.fsum(elements) / len(elements)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in elements) / n)
    largest = max(abs(x) for x in elements)
    found = change_score([np.array(one)[:, None] * scale, np.array(two) * scale], norm)  # type: ignore[arg-type]
    if largest == 0:
        assert found == 0
    elif deviation > 1e-6 * largest:
        absolute = math.fsum(abs(x) for x in elements)
        size = absolute if norm == "l1" else math.hypot(*elements)
        assert found == pytest.approx(size / (math.sqrt(n) * deviation), rel=1e-6)
    else:
        assert found > 1e5


def test_a_layer_that_moves_as_a_whole_scores_above_noise_of_the_same_size() -> None:
    noise = np.random.default_rng(0).standard_normal(1000)
    for norm in ("l1", "l2"):
        assert change_score([noise + 2], norm) > 2 * change_score([noise], norm)  # type: ignore[arg-type]


def test_no_change_scores_nothing_and_an_equal_change_everything() -> None:
    assert change_score([np.zeros(3)]) == 0.0
    assert change_score([np.ones(4), np.ones((2, 2))]) == np.inf


@pytest.mark.parametrize(
    ("fraction", "layers", "count"),
    [
        (0.5, 12, 6),
        (0.5, 1, 1),
        (0.01, 12, 1),
        (1.0, 12, 12),
        (0.3, 4, 1),
        (0.4, 4, 2),
        (0.5, 0, 0),
    ],
)
def test_a_fraction_is_the_nearest_whole_number_and_at_least_one(
    fraction: float, layers: int, count: int
) -> None:
    assert count_of(fraction, layers) == count


def test_the_highest_come_in_the_layers_order_and_ties_go_to_the_first() -> None:
    scores = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 3.0, "e": 2.0}
    assert highest(scores, 2) == ["b", "d"]
    assert highest(scores, 3) == ["b", "c", "d"]
    assert highest(scores, 0) == []
