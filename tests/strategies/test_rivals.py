"""f3ocus and fed-hello: their programs and draws, against enumeration and frequencies."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerfed.models.layers import LayerMap
from layerfed.server.candidates import Candidates
from layerfed.strategies import F3OCUS, FedHeLLo
from layerfed.strategies.fed_hello import groups
from tests.candidates import candidates, within_budgets
from tests.conftest import TinyNet
from tests.tiny_task import configured, run

LAYERS = LayerMap.from_model(TinyNet())


# ---------------------------------------------------------------------------------------- f3ocus
@pytest.mark.parametrize("diversity", [0.0, 0.5, 2.0, 100.0])
@pytest.mark.parametrize("seed", range(4))
def test_importance_and_diversity_are_traded_by_an_optimum(seed: int, diversity: float) -> None:
    """The paper's two aims, with its own terms: Σ S m and the variance of the layers' counts."""
    rng = np.random.default_rng(seed)
    eigenvalues = rng.lognormal(size=(3, 4))
    case = candidates([2] * 3, [1.0] * 4, {"ntk_eigenvalue": eigenvalues.tolist()})
    masks = F3OCUS(LAYERS, diversity=diversity).select(case).masks
    shares = eigenvalues / eigenvalues.sum(axis=1, keepdims=True)
    scale = np.sort(shares, axis=1)[:, -2:].mean() / 3  # the mean share of picks made alone

    def aim(chosen: np.ndarray) -> float:
        return float((shares * chosen).sum() - diversity * scale * 4 * chosen.sum(axis=0).var())

    whole = [np.array(row, dtype=bool) for row in product((0, 1), repeat=4) if sum(row) == 2]
    best = max(aim(np.stack(rows)) for rows in product(whole, repeat=3))
    assert within_budgets(case, masks)
    assert aim(masks) == pytest.approx(best, abs=1e-6)
    if diversity == 100.0:
        assert masks.sum(axis=0).max() - masks.sum(axis=0).min() <= 1


def test_a_client_with_large_eigenvalues_counts_like_any_other() -> None:
    eigenvalues = np.random.default_rng(1).lognormal(size=(4, 5))
    case = candidates([1] * 4, [1.0] * 5, {"ntk_eigenvalue": eigenvalues.tolist()})
    eigenvalues[2] *= 1e6
    scaled = candidates([1] * 4, [1.0] * 5, {"ntk_eigenvalue": eigenvalues.tolist()})
    both = [F3OCUS(LAYERS).select(each).masks for each in (case, scaled)]
    np.testing.assert_array_equal(*both)


# ------------------------------------------------------------------------------------- fed-hello
@settings(deadline=None, max_examples=80)
@given(st.lists(st.floats(0, 100), min_size=3, max_size=8))
def test_groups_are_those_of_the_best_three_means(scores: list[float]) -> None:
    def spread(labels: np.ndarray) -> float:
        own = (np.array(scores)[labels == label] for label in set(labels.tolist()))
        return sum(float(((part - part.mean()) ** 2).sum()) for part in own)

    found = groups(np.array(scores))
    best = min(spread(np.array(labels)) for labels in product((1, 2, 3), repeat=len(scores)))
    assert spread(found) == pytest.approx(best, abs=1e-6)
    order = np.argsort(scores)
    assert (np.diff(found[order]) >= 0).all()


def test_few_layers_have_groups_too() -> None:
    assert groups(np.array([5.0])).tolist() == [3.0]
    assert groups(np.array([5.0, 1.0])).tolist() == [3.0, 2.0]
    assert groups(np.array([5.0, 5.0])).tolist() == [3.0, 3.0]


def test_layers_of_the_highest_group_are_drawn_three_times_as_often() -> None:
    scores = [[0.1, 5.0, 9.0, 5.1]] * 600
    case = candidates([1] * 600, [1.0] * 4, {"fisher": scores})
    drawn = FedHeLLo(LAYERS).select(case).masks.mean(axis=0)
    np.testing.assert_allclose(drawn, np.array([1, 2, 3, 2]) / 8, atol=0.06)


def test_scores_are_averaged_over_examples() -> None:
    case = candidates([1, 1], [1.0] * 3, {"fisher": [[9.0, 0.0, 1.0], [0.0, 9.0, 1.0]]})
    object.__setattr__(case, "counts", np.array([1, 99]))
    assert FedHeLLo(LAYERS)._weights(case).tolist() == [1.0, 3.0, 2.0]


def test_one_client_does_not_decide_the_scores_of_all() -> None:
    scores = [[1.0, 2.0, 9.0]] * 9 + [[9e12, 0.0, 0.0]]
    case = candidates([1] * 10, [1.0] * 3, {"fisher": scores})
    assert FedHeLLo(LAYERS)._weights(case).tolist() == [2.0, 1.0, 3.0]


@pytest.mark.parametrize(
    ("allocation", "weights"),
    [
        ("bottleneck", [3, 3, 2, 2, 1, 1, 1, 1, 2, 2, 3, 3]),
        ("triangle", [3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1]),
        ("inverted-triangle", [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]),
        ("uniform", [1] * 12),
    ],
)
def test_patterns_have_their_shape_and_need_no_probe(allocation: str, weights: list[int]) -> None:
    rule = FedHeLLo(LAYERS, allocation=allocation)
    assert rule.statistics == ()
    assert rule._weights(candidates([1], [1.0] * 12)).tolist() == weights


def test_draws_follow_seed_round_and_client_and_keep_to_budgets() -> None:
    rule = FedHeLLo(LAYERS, allocation="uniform")
    budgets = [0, 1, 2, 4, 9]
    masks = [
        rule.select(candidates(budgets, [1.0] * 5, server_round=n, seed=3)).masks for n in (1, 1, 2)
    ]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).any()
    assert masks[0].sum(axis=1).tolist() == [0, 1, 2, 4, 5]


def test_examples_beyond_the_most_that_count_weigh_nothing() -> None:
    scores = {"fisher": [[9, 1, 1, 1], [9, 1, 1, 1], [1, 1, 1, 9]]}
    case = candidates([1] * 3, [1] * 4, scores)
    hostile = replace(case, examples=np.array([12, 12, 2**29]))
    first, second = (FedHeLLo(LAYERS).select(each).masks for each in (case, hostile))
    np.testing.assert_array_equal(first, second)


@pytest.mark.usefixtures("tiny_task")
def test_counts_are_those_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def weights(self: FedHeLLo, candidates: Candidates) -> np.ndarray:
        seen.append((candidates.examples.min(), candidates.counts.max()))
        return np.ones(4)

    monkeypatch.setattr(FedHeLLo, "_weights", weights)
    run(configured("strategy.name=fed-hello", "federation.max-examples=3"), 1)
    assert seen[0][0] > 3 == seen[0][1]
