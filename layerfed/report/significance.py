"""Paired tests: whether two entries of a comparison differ by more than their seeds do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean

import numpy as np

from layerfed.report.figures import RunFigures

__all__ = ["LEVEL", "POWER", "Paired", "differences_by_seed", "holm", "paired_test", "seeds_needed"]

LEVEL, POWER = 0.05, 0.8
# Signs of this many differences are flipped in all ways, of more in as many random ways.
MOST_EXACT = 14
MOST_SEEDS = 100_000


@dataclass(frozen=True)
class Paired:
    """What runs that are paired by seed say about the difference of two entries.

    Attributes
    ----------
    seeds : int
        The number of pairs.
    mean : float
        The mean difference.
    low, high : float
        The 95% confidence interval of Student's t; NaN for one pair.
    p : float
        Of the paired t-test, two-sided: it takes the differences to be normal. NaN for one pair, and for
        equal differences, whose spread says nothing.
    p_signs : float
        Of the sign-flip test, two-sided: it takes the differences to be as likely positive as negative.
        It is exact up to 14 pairs, and never below 2^(1 - pairs).
    p_holm : float
        `p`, corrected by `holm` for the number of entries that were compared.
    needed : int or None
        Seeds for 80% power of the t-test at 5%, if mean and spread were those found here; None if they
        are unknown or more than 100,000.
    """

    seeds: int
    mean: float
    low: float
    high: float
    p: float
    p_signs: float
    p_holm: float = math.nan
    needed: int | None = None


def differences_by_seed(runs: Sequence[RunFigures], others: Sequence[RunFigures]) -> list[float]:
    """Return the differences of the main scores of runs with the same seed; of shares in points.

    Runs that repeat a seed count once, by their mean.
    """
    ours, theirs = (_by_seed(some) for some in (runs, others))
    pairs = ((own, theirs.get(seed, math.nan)) for seed, own in ours.items())
    return [own - other for own, other in pairs if not math.isnan(own - other)]


def _by_seed(runs: Sequence[RunFigures]) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for run in runs:
        found.setdefault(run.seed, []).append(run.metric.scale * run.value)
    return {seed: fmean(values) for seed, values in found.items()}


def paired_test(differences: Sequence[float]) -> Paired:
    """Return the paired tests of at least one difference.

    Equal differences have no spread: a rounding error of 1e-16 must not become a p of 0.
    """
    found = np.asarray(differences, dtype=float)
    count, mean = len(found), float(found.mean())
    signs = _sign_flips(found)
    if count < 2:
        return Paired(count, mean, math.nan, math.nan, math.nan, signs)
    spread = float(found.std(ddof=1))
    if spread <= 1e-9 * float(np.abs(found).max()):
        return Paired(count, mean, mean, mean, math.nan, signs)
    from scipy.stats import t

    error = spread / math.sqrt(count)
    reach = error * _critical(count)
    return Paired(
        seeds=count,
        mean=mean,
        low=mean - reach,
        high=mean + reach,
        p=float(2 * t.sf(abs(mean) / error, count - 1)),
        p_signs=signs,
        needed=seeds_needed(mean / spread),
    )


def holm(tests: Sequence[Paired]) -> list[Paired]:
    """Return the tests with p corrected for their number (Holm 1979); NaN is no test.

    The k-th smallest of m is multiplied by m - k + 1, and is not below the one before it.
    """
    order = sorted(
        (n for n, test in enumerate(tests) if not math.isnan(test.p)), key=lambda n: tests[n].p
    )
    corrected, before = list(tests), 0.0
    for k, n in enumerate(order):
        before = min(1.0, max(before, (len(order) - k) * tests[n].p))
        corrected[n] = replace(tests[n], p_holm=before)
    return corrected


def seeds_needed(effect: float) -> int | None:
    """Return the smallest number of pairs that gives the t-test 80% power.

    Parameters
    ----------
    effect : float
        Mean difference over the standard deviation of differences. The test's statistic follows the
        noncentral t distribution with noncentrality `effect * sqrt(pairs)`.
    """
    from scipy.stats import nct

    effect = abs(effect)

    def enough(count: int) -> bool:
        # The chance of a significant difference of the wrong sign is left out: below 1e-5 at this power.
        power = nct.sf(_critical(count), count - 1, effect * math.sqrt(count))
        return bool(power >= POWER)

    # Beyond 50 standard deviations two pairs are always enough, where the library's series would fail.
    if effect > 50:
        return 2
    low, high = 1, 2
    while not enough(high):
        if high == MOST_SEEDS:
            return None
        low, high = high, min(2 * high, MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@cache
def _critical(count: int) -> float:
    """Return the value of |t| that is significant with this number of pairs."""
    from scipy.stats import t

    return float(t.isf(LEVEL / 2, count - 1))


@cache
def _signs(count: int) -> np.ndarray:
    """Return the ways to flip signs, shape (ways, pairs); the first flips none."""
    if count <= MOST_EXACT:
        return 1.0 - 2.0 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (2**MOST_EXACT, count))
    signs[0] = 1.0
    return signs


def _sign_flips(differences: np.ndarray) -> float:
    """Return the share of the ways to flip signs whose mean is as far from 0 as the observed one."""
    sums = np.abs(_signs(len(differences)) @ differences)
    return float(np.mean(sums >= sums[0] - 1e-9 * np.abs(differences).sum()))
