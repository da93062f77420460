"""Measured costs on a grid: never too far, never by more than said, and solved."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import all_masks, problems

from layerfed.selection import SelectionProblem, knapsack, round_costs, rounding, solve


def measured(seed: int, n: int = 10, layers: int = 24, *, depth: bool = False) -> SelectionProblem:
    """Seconds with 5% noise per client and layer, devices of different speed."""
    rng = np.random.default_rng(seed)
    values = rng.lognormal(size=(1, layers)) * rng.lognormal(sigma=0.7, size=(n, layers))
    speed = rng.lognormal(sigma=0.3, size=(n, 1))
    costs = speed * (1 + 0.05 * rng.standard_normal((n, layers)))
    fall = speed * 0.5 * np.arange(layers)[::-1] if depth else None
    budgets = rng.integers(1, 5, size=n) * (4.0 if depth else 1.0)
    return SelectionProblem(values, costs, budgets, 0.5 * values.mean() / n, fall)


@given(problems(), st.sampled_from([0.02, 0.3]), st.floats(0.01, 7.0))
@settings(max_examples=100, deadline=None)
def test_allows_nothing_over_budget_and_everything_that_leaves_the_share(
    problem: SelectionProblem, share: float, stretch: float
) -> None:
    depth = None if problem.depth_costs is None else problem.depth_costs * stretch
    problem = SelectionProblem(
        problem.values, problem.costs * stretch, problem.budgets, problem.consistency, depth
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "ENUMERATION_LAYERS", 0)
        rounded, taken = round_costs(problem, share)
    assert taken <= share

    for masks in list(all_masks(problem))[::7]:
        if rounded.feasible(masks):
            assert problem.feasible(masks)
        elif problem.feasible(masks):
            spent = problem.spent(masks) - (1 - taken) * problem.budgets
            assert np.any(spent > -1e-6 * problem.budgets)


@pytest.mark.parametrize("depth", [False, True])
def test_noisy_seconds_come_to_stand_on_a_grid_and_are_proved(depth: bool) -> None:
    problem = measured(0, depth=depth)

    rounded, taken = round_costs(problem, 0.02)
    selection = solve(rounded, time_limit=30.0)

    assert 0.01 < taken <= 0.02
    assert knapsack.Grid.of(problem) is None
    assert knapsack.Grid.of(rounded) is not None
    assert selection.gap <= 1e-6
    assert problem.feasible(selection.masks)


def test_the_bound_holds_for_selections_that_leave_the_share_unspent() -> None:
    problem = measured(1)
    rounded, taken = round_costs(problem, 0.1)
    frugal = SelectionProblem(
        problem.values, problem.costs, (1 - taken) * problem.budgets, problem.consistency
    )

    assert solve(rounded).bound >= solve(frugal).objective * (1 - 1e-9)


@pytest.mark.parametrize(
    "costs",
    [np.ones(24), np.full((10, 24), np.linspace(0.3, 0.7, 10)[:, None]), np.arange(24.0)],
    ids=["unit", "equal on each client", "whole numbers"],
)
def test_costs_that_need_no_rounding_stay(costs: np.ndarray) -> None:
    problem = SelectionProblem(np.ones((10, 24)), costs, np.full(10, 3.0), 0.1)

    assert round_costs(problem, 0.02) == (problem, 0.0)


def test_few_layers_and_a_share_of_nothing_stay_exact() -> None:
    few, many = measured(0, layers=12), measured(0)

    assert round_costs(few, 0.02) == (few, 0.0)
    assert round_costs(many, 0.0) == (many, 0.0)


def test_a_client_without_budget_gets_nothing_but_what_is_free() -> None:
    base = measured(0)
    costs, budgets = np.array(base.costs), np.array(base.budgets)
    budgets[0], costs[0, 3] = 0.0, 0.0
    problem = SelectionProblem(base.values, costs, budgets, 0.0)

    masks = solve(round_costs(problem, 0.02)[0]).masks

    assert np.flatnonzero(masks[0]).tolist() == [3]


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_refuses_an_impossible_share(share: float) -> None:
    with pytest.raises(ValueError, match=r"expected a number in \[0, 1\)"):
        round_costs(measured(0), share)
