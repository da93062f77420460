"""Preparation before solving: measured costs on a grid, the scale-free λ, and outlying clients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import all_masks, problems, random_problem, raw_consistency

from layerfed.selection import (
    SelectionProblem,
    knapsack,
    limit_weights,
    preparing,
    round_costs,
    solve,
)


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
        patch.setattr(preparing, "ENUMERATION_LAYERS", 0)
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


@pytest.mark.parametrize("budget", [5e-324, 1e-310, 2.3e-308])
def test_a_budget_that_no_unit_divides_affords_nothing(budget: float) -> None:
    base = measured(0)
    budgets = np.array(base.budgets)
    budgets[0] = budget

    with np.errstate(divide="raise", over="raise", invalid="raise"):
        rounded, taken = round_costs(replace(base, budgets=budgets), 0.02)
    masks = solve(rounded).masks

    assert 0 < taken <= 0.02
    assert np.isfinite(rounded.cost_matrix).all()
    assert masks.any(axis=1).tolist() == [False] + [True] * 9


def test_a_small_budget_buys_what_costs_as_little() -> None:
    base = measured(0)
    costs, budgets = np.array(base.costs), np.array(base.budgets)
    costs[0] *= 1e-300
    budgets[0] *= 1e-300

    small = solve(round_costs(replace(base, costs=costs, budgets=budgets), 0.02)[0])

    np.testing.assert_array_equal(small.masks, solve(round_costs(base, 0.02)[0]).masks)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_refuses_an_impossible_share(share: float) -> None:
    with pytest.raises(ValueError, match=r"expected a number in \[0, 1\)"):
        round_costs(measured(0), share)


def test_is_relative_to_the_mean_selected_gain_divided_by_the_clients() -> None:
    values = [[1.0, 5.0, 3.0], [4.0, 2.0, 0.0]]

    raw = raw_consistency(values, [1.0, 1.0, 1.0], [2.0, 1.0], 0.5)

    assert raw == 0.5 * ((5.0 + 3.0 + 4.0) / 3) / 2


def test_selection_does_not_depend_on_the_unit_of_the_gradients() -> None:
    base = random_problem(9)
    masks = []
    for unit in (1.0, 1e-9, 1e9):
        values = base.values * unit
        raw = raw_consistency(values, base.costs, base.budgets, 1.0)
        masks.append(solve(SelectionProblem(values, base.costs, base.budgets, raw)).masks)

    np.testing.assert_array_equal(masks[0], masks[1])
    np.testing.assert_array_equal(masks[0], masks[2])


def test_keeps_the_sign_and_is_zero_where_nothing_is_affordable() -> None:
    assert raw_consistency([[1.0], [1.0]], [1.0], [1.0, 1.0], -2.0) == -1.0
    assert raw_consistency([[1.0]], [2.0], [1.0], 1.0) == 0.0
    assert raw_consistency(np.zeros((0, 2)), [1.0, 1.0], [], 1.0) == 0.0


def test_respects_depth_costs() -> None:
    raw = raw_consistency([[9.0, 1.0]], [1.0, 1.0], [2.0], 1.0, depth_costs=[2.0, 0.0])

    assert raw == 1.0


def test_honest_gains_set_the_scale_by_their_plain_mean() -> None:
    values = np.random.default_rng(0).uniform(1.0, 3.0, size=(11, 6))

    raw = raw_consistency(values, np.ones(6), np.full(11, 2.0), 1.0)

    assert raw == pytest.approx(np.sort(values, axis=1)[:, -2:].mean() / 11)


@pytest.mark.parametrize("claim", [1e3, 1e12, 1e300])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_one_clients_claim_does_not_set_the_scale_of_everyone(n: int, claim: float) -> None:
    values = np.ones((n, 4))
    honest = raw_consistency(values, np.ones(4), np.full(n, 2.0), 1.0)
    values[n // 2] = claim

    raw = raw_consistency(values, np.ones(4), np.full(n, 2.0), 1.0)

    assert honest <= raw <= honest * (1 + 2.0 / n + 1e-9)


def test_just_under_half_of_the_clients_cannot_push_the_scale() -> None:
    values = np.ones((9, 4))
    values[:4] = 1e12

    raw = raw_consistency(values, np.ones(4), np.ones(9), 1.0)

    assert raw <= 3.0 / 9


def test_an_enormous_claim_leaves_the_other_clients_choices_alone() -> None:
    values = random_problem(9, 11, 12).values.copy()
    costs, budgets = np.ones(12), np.full(11, 2.0)

    def masks(table: np.ndarray) -> np.ndarray:
        problem, _ = limit_weights(SelectionProblem(table, costs, budgets, 0.0))
        raw = raw_consistency(problem.values, costs, budgets, 0.3)
        return solve(SelectionProblem(problem.values, costs, budgets, raw)).masks

    loud = values.copy()
    loud[4] *= 1e4
    louder = values.copy()
    louder[4] *= 1e14

    np.testing.assert_array_equal(masks(loud), masks(louder))
    assert masks(louder).sum(axis=1).min() >= 1
    differing = (masks(louder) != masks(values)).any(axis=1)
    assert np.delete(differing, 4).sum() <= 2


def test_weights_keep_the_order_of_a_clients_layers() -> None:
    values = np.ones((3, 2))
    values[1] = [1e9, 2e9]

    limited, weights = limit_weights(SelectionProblem(values, [1.0, 1.0], [1.0] * 3, 0.1))

    assert weights.tolist() == [1.0, 5e-7, 1.0]
    np.testing.assert_allclose(limited.values[1], [500.0, 1000.0])


def test_comparable_clients_are_left_alone() -> None:
    problem = random_problem(9)

    limited, weights = limit_weights(problem)

    assert limited is problem
    assert (weights == 1.0).all()
    empty = SelectionProblem(np.zeros((2, 3)), np.ones(3), np.ones(2), 0.0)
    assert limit_weights(empty)[0] is empty
