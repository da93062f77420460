"""The other penalties, pair by pair and client by client as they are defined, against all masks."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import all_masks, problems, random_problem, within_budgets

from layerfed.selection import SelectionProblem, charge_switching, forgive_richer, solve


def charged(problem: SelectionProblem, masks: np.ndarray) -> float:
    """The objective: of a pair, only what the poorer one has alone counts, twice."""
    costs = np.broadcast_to(problem.costs, problem.values.shape).sum(axis=1)
    if problem.depth_costs is not None:
        costs = costs + np.broadcast_to(problem.depth_costs, problem.values.shape)[:, 0]
    wealth = problem.budgets / np.where(costs > 0, costs, 1.0)
    dissent = 0
    for i, j in combinations(range(len(masks)), 2):
        poor, rich = (i, j) if wealth[i] < wealth[j] else (j, i)
        if np.isclose(wealth[i], wealth[j], rtol=1e-9, atol=0):
            dissent += int((masks[i] != masks[j]).sum())
        else:
            dissent += 2 * int((masks[poor] & ~masks[rich]).sum())
    return float((problem.values * masks).sum() - problem.consistency * dissent)


@settings(deadline=None, max_examples=150)
@given(problems())
def test_no_other_masks_are_better_if_only_what_is_affordable_is_charged(
    problem: SelectionProblem,
) -> None:
    found = solve(forgive_richer(problem))
    truth = max(charged(problem, m) for m in all_masks(problem) if within_budgets(problem, m))
    scale = float(np.abs(problem.values).sum())
    scale += max(-problem.consistency, 0.0) * problem.clients**2 * problem.layers
    assert problem.feasible(found.masks)
    assert charged(problem, found.masks) == pytest.approx(truth, rel=1e-6, abs=1e-6 * scale + 1e-9)
    assert found.bound >= truth - 1e-6 * scale - 1e-9 or problem.consistency > scale


@settings(deadline=None, max_examples=100)
@given(problems())
def test_the_new_gains_are_the_other_penalty_for_all_masks(problem: SelectionProblem) -> None:
    moderate = replace(problem, consistency=min(problem.consistency, 1.0))
    other = forgive_richer(replace(moderate, values=moderate.values + 5.0))
    for masks in list(all_masks(problem))[::7]:
        expected = charged(moderate, masks) + 5.0 * masks.sum()
        assert other.objective(masks) == pytest.approx(expected, abs=1e-9)


def test_with_equal_budgets_it_is_the_papers_penalty() -> None:
    problem = replace(random_problem(0), budgets=np.full(20, 2.0), consistency=0.05)
    other = forgive_richer(problem)
    np.testing.assert_array_equal(other.values, problem.values)
    assert other.consistency == problem.consistency


def test_rich_clients_spend_their_budgets_under_a_large_charge() -> None:
    """Where the paper's penalty leaves them unspent, since it charges every difference."""
    problem = replace(random_problem(1), consistency=1e9)
    assert problem.budgets.min() < problem.budgets.max()
    paper, other = solve(problem).masks, solve(forgive_richer(problem)).masks
    assert paper.sum(axis=1).max() == problem.budgets.min()
    np.testing.assert_array_equal(other.sum(axis=1), problem.budgets)
    order = np.argsort(problem.budgets)
    for poor, rich in pairwise(order):
        assert not (other[poor] & ~other[rich]).any(), "each one's layers are among a richer one's"


@pytest.mark.parametrize("n", [20, 100])
def test_a_rounds_size_is_proved_optimal(n: int) -> None:
    problem = random_problem(2, n=n, layers=24)
    for relative in (0.1, 1.0):
        lam = relative * float(problem.values.mean()) / n
        found = solve(forgive_richer(replace(problem, consistency=lam)))
        assert found.gap <= 1e-6


@settings(deadline=None, max_examples=100)
@given(problems(), st.sampled_from([0.0, 0.5, 3.0, 1e6]), st.integers(0, 99))
def test_switching_is_charged_by_layer_and_client(
    problem: SelectionProblem, cost: float, seed: int
) -> None:
    last = np.random.default_rng(seed).choice([0.0, 0.5, 1.0], problem.values.shape)
    moderate = replace(problem, consistency=min(problem.consistency, 50.0))
    changed, constant = charge_switching(moderate, last, cost)
    found = solve(changed)

    def explicit(masks: np.ndarray) -> float:
        return moderate.objective(masks) - cost * float(np.abs(masks - last).sum())

    truth = max(explicit(m) for m in all_masks(problem) if within_budgets(problem, m))
    scale = changed.magnitude
    assert explicit(found.masks) == pytest.approx(truth, abs=1e-6 * scale + 1e-9)
    assert found.objective - constant == pytest.approx(
        explicit(found.masks), abs=1e-9 * scale + 1e-9
    )
