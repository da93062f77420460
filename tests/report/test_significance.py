"""Paired tests against scipy's own, every way to flip signs, and published numbers of seeds."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from layerfed.exchange.scores import ACCURACY
from layerfed.report.significance import (
    Paired,
    differences_by_seed,
    holm,
    paired_test,
    seeds_needed,
)

DIFFERENCES = [1.2, -0.4, 2.2, 0.9, 1.7]


def test_the_t_test_is_scipys() -> None:
    found, theirs = paired_test(DIFFERENCES), stats.ttest_1samp(DIFFERENCES, 0.0)
    assert found.seeds == 5
    assert found.p == pytest.approx(theirs.pvalue)
    interval = theirs.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=7))
def test_signs_are_flipped_in_every_way(differences: list[int]) -> None:
    ways = list(itertools.product((1, -1), repeat=len(differences)))
    sums = [abs(sum(s * d for s, d in zip(way, differences, strict=True))) for way in ways]
    far = sum(total >= abs(sum(differences)) for total in sums)
    # Tenths are no binary fractions: equal sums differ by rounding.
    assert paired_test([d / 10 for d in differences]).p_signs == far / len(ways)


def test_many_signs_are_flipped_at_random() -> None:
    differences = np.random.default_rng(1).normal(0.4, 1.0, 30)
    theirs = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=20_000, rng=2
    )
    assert paired_test(differences.tolist()).p_signs == pytest.approx(theirs.pvalue, abs=0.01)


# Two-sided paired t-test, 5%, 80% power: Cohen's tables, as G*Power and R's power.t.test have them.
@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (-0.8, 15), (1.0, 10)])
def test_seeds_needed_are_the_published_ones(effect: float, seeds: int) -> None:
    assert seeds_needed(effect) == seeds


def test_with_that_many_seeds_four_of_five_experiments_find_the_difference() -> None:
    draws = np.random.default_rng(0).normal(0.8, 1.0, (20_000, 15))
    assert np.mean(stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05) == pytest.approx(
        0.82, abs=0.02
    )


def test_extremes_have_an_answer() -> None:
    assert seeds_needed(0.0) is None
    assert [seeds_needed(effect) for effect in (20.0, 49.0, 51.0, 1e9)] == [2, 2, 2, 2]
    one = paired_test([3.0])
    assert (one.mean, one.p_signs, one.needed) == (3.0, 1.0, None)
    assert math.isnan(one.p)


def test_equal_differences_are_no_evidence_by_themselves() -> None:
    """0.1 + 0.2 is not 0.3: without a floor, the t-test would be certain of a difference."""
    same = paired_test([0.3, 0.1 + 0.2, 0.3])
    assert math.isnan(same.p)
    assert (same.low, same.high, same.p_signs) == (same.mean, same.mean, 0.25)
    assert paired_test([0.0, 0.0]).p_signs == 1.0


def test_p_is_corrected_for_the_number_of_tests() -> None:
    """The example of R's p.adjust: 0.01, 0.02, 0.03, 0.005 become 0.03, 0.04, 0.04, 0.02."""
    tests = [Paired(3, 0, 0, 0, p, 1.0) for p in (0.01, 0.02, 0.03, 0.005, math.nan)]
    assert [test.p_holm for test in holm(tests)[:4]] == pytest.approx([0.03, 0.04, 0.04, 0.02])
    assert math.isnan(holm(tests)[4].p_holm)
    assert holm([Paired(3, 0, 0, 0, 0.9, 1.0)] * 2)[0].p_holm == 1.0


def run_of(seed: int, value: float) -> Any:
    return SimpleNamespace(seed=seed, metric=ACCURACY, value=value)


def test_runs_that_repeat_a_seed_are_one_pair() -> None:
    ours = [run_of(0, 0.5), run_of(0, 0.7), run_of(1, 0.4)]
    theirs = [run_of(0, 0.2), run_of(0, 0.4), run_of(1, 0.4), run_of(2, 0.9)]
    assert differences_by_seed(ours, theirs) == pytest.approx([30.0, 0.0])
    assert differences_by_seed(theirs, ours) == pytest.approx([-30.0, 0.0])


def test_the_most_seeds_are_what_is_documented() -> None:
    assert seeds_needed(0.01) == pytest.approx(78_490, rel=1e-3)
    assert seeds_needed(0.008) is None
