"""ε against the definition of differential privacy, and the rounds that count."""

from __future__ import annotations

import math
import sys

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given
from hypothesis import strategies as st

from layerfed.config import ConfigError, PrivacyConfig
from layerfed.privacy.account import PrivacyAccount, epsilon_of
from layerfed.runs.records import RoundRecord
from layerfed.server.private import Accounting

DELTA = 1e-5
NOISE = st.floats(0.05, 50)


def delta_of(epsilon: float, mu: float) -> float:
    """δ of a Gaussian mechanism whose two outputs lie μ standard deviations apart [Balle and Wang]."""

    def below(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    return below(mu / 2 - epsilon / mu) - math.exp(epsilon) * below(-mu / 2 - epsilon / mu)


def account(
    *, noise: float, statistics_noise: float = 0.0, probed: tuple[str, ...] = (), **more: object
) -> PrivacyAccount:
    statistics_clip = 1.0 if statistics_noise else 0.0
    section = PrivacyConfig.model_validate(
        {
            "mode": "central",
            "noise": noise,
            "statistics_noise": statistics_noise,
            "statistics_clip": statistics_clip,
            **more,
        }
    )
    return PrivacyAccount(section, lambda _round: probed, 10)


@pytest.mark.parametrize("noise", [1.0, 2.0, 8.0, 40.0])
@pytest.mark.parametrize("rounds", [1, 7])
def test_epsilon_is_that_of_the_definition(noise: float, rounds: int) -> None:
    """Exchanging one client's data moves a sum with noise z·C by 2C, so μ = 2/z in each round."""
    spent = account(noise=noise)
    for number in range(1, rounds + 1):
        spent.count(number, [0, 1])
    assert delta_of(spent.epsilon, 2 / noise * math.sqrt(rounds)) == pytest.approx(DELTA, rel=1e-6)


def test_epsilon_is_never_above_what_another_accountant_allows() -> None:
    """Rényi accounting is an upper bound of the exact figure, and not far from it."""
    for noise, rounds in [(1.0, 1), (2.0, 10), (20.0, 30)]:
        spent, other = account(noise=noise), RdpAccountant(None, NeighboringRelation.REPLACE_ONE)
        for number in range(1, rounds + 1):
            spent.count(number, [3])
        other.compose(SelfComposedDpEvent(GaussianDpEvent(noise / 2), rounds))
        assert spent.epsilon <= other.get_epsilon(DELTA) <= 1.3 * spent.epsilon


@given(NOISE, st.integers(1, 30))
def test_more_rounds_cost_more_and_more_noise_costs_less(noise: float, rounds: int) -> None:
    def epsilon(z: float, count: int) -> float:
        return epsilon_of(count * 4 / z**2, DELTA)

    assert epsilon(noise, rounds + 1) > epsilon(noise, rounds) > epsilon(1.1 * noise, rounds)


def test_the_client_that_was_asked_most_often_counts() -> None:
    spent, alone = account(noise=3.0), account(noise=3.0)
    for number, clients in enumerate([[0, 1], [1, 2], [1, 3], [4]], start=1):
        spent.count(number, clients)
    for number in (1, 2, 3):
        alone.count(number, [1])
    assert spent.epsilon == alone.epsilon


def test_noise_on_statistics_adds_up_with_that_on_updates() -> None:
    """Each of two statistics is one more mechanism."""
    both = account(noise=4.0, statistics_noise=3.0, probed=("grad_norm_sq", "snr"))
    both.count(1, [0])
    assert both.epsilon == pytest.approx(epsilon_of(4 / 16 + 2 * 4 / 9, DELTA))
    assert both.covers == "updates and selection"


def test_what_epsilon_covers() -> None:
    assert account(noise=1.0, probed=("grad_norm_sq",)).covers == "updates"
    assert account(noise=1.0).covers == "updates and selection"


def test_without_noise_it_is_infinite() -> None:
    spent = account(noise=0.0)
    assert spent.epsilon == 0.0  # nothing was asked of anybody yet
    spent.count(1, [0])
    assert spent.epsilon == math.inf


def test_a_round_that_was_cut_off_counts_twice_for_everyone() -> None:
    resumed, through = account(noise=2.0), account(noise=2.0)
    resumed.recall([(1, [0, 1]), (2, [1])], repeated=[3])
    for number in (1, 2, 3):
        through.count(number, [1])
    assert resumed.epsilon == through.epsilon


def test_it_fills_in_the_record_of_each_round() -> None:
    spent, last = account(noise=2.0), 0.0
    for number in (1, 2):
        record = RoundRecord(number)
        record.ledger[5].down = 1
        Accounting(spent).record(record)
        assert record.epsilon is not None
        assert record.epsilon > last
        assert record.epsilon_covers == "updates and selection"
        last = record.epsilon


def test_a_smaller_delta_costs_more() -> None:
    found = [epsilon_of(1.0, delta) for delta in (1e-3, 1e-5, 1e-9)]
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_tiny_and_huge_noise_give_finite_figures() -> None:
    assert epsilon_of(4 / 0.001**2 * 100, DELTA) == pytest.approx(2e8, rel=0.1)
    assert epsilon_of(4 / 1e9**2, DELTA) == 0.0


def test_a_missing_accountant_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[privacy\]' in the clone"):
        account(noise=1.0)


@pytest.mark.parametrize(
    ("noise", "epsilon"), [(1e-200, math.inf), (5e-324, math.inf), (1e160, 0.0)]
)
def test_extreme_noise_has_an_epsilon(noise: float, epsilon: float) -> None:
    spent = account(noise=noise)
    spent.count(1, [0])
    assert spent.epsilon == pytest.approx(epsilon, abs=1e-9)
