"""Every solver against enumeration, and against each other."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest
from hypothesis import given, settings
from selection_cases import brute_force, problems, random_problem

from layerfed.selection import SelectionProblem, Solver, solve, solve_lagrangian, solve_milp

SOLVERS: list[Solver] = ["auto", "lagrangian", "milp"]


@given(problems())
@settings(max_examples=80, deadline=None)
def test_auto_equals_brute_force(problem: SelectionProblem) -> None:
    truth = brute_force(problem)

    selection = solve(problem, gap=0.0)

    assert problem.feasible(selection.masks)
    assert selection.objective == pytest.approx(truth.objective, rel=1e-8, abs=1e-8)
    assert selection.bound >= truth.objective - 1e-8 * max(1.0, abs(truth.objective))
    assert selection.gap <= 1e-7


@given(problems())
@settings(max_examples=40, deadline=None)
def test_milp_equals_brute_force(problem: SelectionProblem) -> None:
    truth = brute_force(problem)

    selection = solve_milp(problem, gap=0.0)

    assert problem.feasible(selection.masks)
    assert selection.objective == pytest.approx(truth.objective, rel=1e-7, abs=1e-7)
    assert selection.bound >= truth.objective - 1e-7 * max(1.0, abs(truth.objective))


@given(problems())
@settings(max_examples=100, deadline=None)
def test_lagrangian_is_feasible_and_bounds_the_optimum(problem: SelectionProblem) -> None:
    truth = brute_force(problem)

    selection = solve_lagrangian(problem)

    tolerance = 1e-9 * max(1.0, abs(truth.objective))
    assert problem.feasible(selection.masks)
    assert selection.objective <= truth.objective + tolerance
    assert selection.bound >= truth.objective - tolerance


@pytest.mark.parametrize("relative", [0.01, 0.1, 0.5, 1.0, 3.0, 10.0, -0.3])
@pytest.mark.parametrize("n", [7, 30])
def test_lagrangian_closes_unit_cost_instances(n: int, relative: float) -> None:
    selection = solve_lagrangian(random_problem(1, n, 16, relative=relative))

    assert selection.gap <= 1e-9
    assert selection.solver == "lagrangian"


@pytest.mark.parametrize(
    ("cost", "depth", "relative"),
    [
        ("unit", False, 0.7),
        ("unit", True, 0.7),
        ("unit", False, -0.7),
        ("parameters", False, 0.3),
        ("parameters", False, -0.3),
        ("parameters", True, 1.0),
    ],
)
def test_solvers_agree_on_a_round_of_eight_clients(cost: str, depth: bool, relative: float) -> None:
    problem = random_problem(2, 8, 8, relative=relative, cost=cost, depth=depth)

    first, second = solve(problem, gap=0.0), solve(problem, solver="milp", gap=0.0)

    assert first.objective == pytest.approx(second.objective, rel=1e-9)
    np.testing.assert_array_equal(first.masks, second.masks)


def test_auto_leaves_the_gap_to_the_integer_program() -> None:
    problem = knapsack_with_gap()
    open_gap = solve_lagrangian(problem)
    assert open_gap.gap > 1e-4  # otherwise this instance tests nothing

    selection = solve(problem)

    assert selection.solver == "lagrangian+milp-highs"
    assert selection.gap <= 1e-6
    assert open_gap.objective - 1e-9 <= selection.objective <= open_gap.bound + 1e-9


def test_a_gap_left_is_logged_with_its_size(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        selection = solve(knapsack_with_gap(), solver="lagrangian")

    assert f"relative gap of {selection.gap:.2e}" in caplog.text
    assert "by lagrangian" in caplog.text


def test_a_closed_gap_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        solve(random_problem(0))

    assert caplog.text == ""


@pytest.mark.parametrize("cost", ["unit", "parameters"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_without_consistency_each_client_picks_its_own_best(solver: Solver, cost: str) -> None:
    problem = random_problem(5, 10, 8, relative=0.0, cost=cost)

    together = solve(problem, solver=solver, gap=0.0)

    for i in range(problem.clients):
        one = SelectionProblem(
            problem.values[i : i + 1], problem.costs, problem.budgets[i : i + 1], 0
        )
        np.testing.assert_array_equal(together.masks[i], brute_force_one(one))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("consistency", [1e4, 1e12, 1e200])
def test_large_consistency_gives_identical_masks(solver: Solver, consistency: float) -> None:
    values = random_problem(6, 10, 8).values
    problem = SelectionProblem(values, np.ones(8), np.full(10, 3.0), consistency)

    selection = solve(problem, solver=solver)

    shared = np.isin(np.arange(8), np.argsort(values.sum(axis=0))[-3:])
    np.testing.assert_array_equal(selection.masks, np.tile(shared, (10, 1)))
    assert selection.gap == 0.0


@pytest.mark.parametrize("solver", SOLVERS)
def test_large_consistency_shares_what_the_poorest_client_affords(solver: Solver) -> None:
    values = random_problem(7, 6, 8).values
    budgets = np.array([2.0, 3.0, 4.0, 2.0, 5.0, 3.0])

    selection = solve(SelectionProblem(values, np.ones(8), budgets, 1e9), solver=solver)

    shared = np.isin(np.arange(8), np.argsort(values.sum(axis=0))[-2:])
    np.testing.assert_array_equal(selection.masks, np.tile(shared, (6, 1)))


@pytest.mark.parametrize("solver", SOLVERS)
def test_edge_cases_follow_their_rules(solver: Solver) -> None:
    empty = SelectionProblem(np.zeros((0, 3)), np.ones(3), np.zeros(0), 1.0)
    single = SelectionProblem([[2.0, 3.0]], [1.0, 1.0], [1.0], 99.0)
    one_layer = SelectionProblem([[2.0], [3.0]], [1.0], [1.0, 1.0], 0.1)
    too_poor = SelectionProblem([[2.0, 3.0], [2.0, 3.0]], [2.0, 3.0], [1.0, 3.0], 0.1)
    losses = SelectionProblem([[-1.0, -2.0]], [1.0, 1.0], [2.0], 0.0)

    assert solve(empty, solver=solver).masks.shape == (0, 3)
    assert solve(empty, solver=solver).objective == 0.0
    assert solve(single, solver=solver).masks.tolist() == [[False, True]]
    assert solve(one_layer, solver=solver).masks.tolist() == [[True], [True]]
    assert solve(too_poor, solver=solver).masks.tolist() == [[False, False], [False, True]]
    assert not solve(losses, solver=solver).masks.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "ecos"}, "solver is 'ecos'; expected one of"),
        ({"time_limit": 0.0}, "time_limit is 0.0; expected seconds above 0"),
        ({"time_limit": float("nan")}, "time_limit is nan"),
        ({"gap": -1.0}, r"gap is -1.0; expected a relative gap in \[0, 1\)"),
    ],
)
def test_refuses_impossible_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(random_problem(0), **arguments)  # type: ignore[arg-type]


def brute_force_one(problem: SelectionProblem) -> np.ndarray:
    (optimum,) = brute_force(problem).optima
    return optimum[0]


def knapsack_with_gap() -> SelectionProblem:
    """Diversity under parameter costs: the bound stays open, with no counts to branch on."""
    return random_problem(2, 8, 8, relative=-1.0, cost="parameters")


def test_without_consistency_no_client_depends_on_the_gradients_of_another() -> None:
    values = np.random.default_rng(0).uniform(1, 10, (10, 12))
    values[3] *= 1e-11
    values[7, 5] = 1e12
    budgets = np.ones(10)
    for solver in ("auto", "lagrangian", "milp"):
        found = solve(SelectionProblem(values, np.ones(12), budgets, 0.0), solver=solver)
        assert found.masks.argmax(axis=1).tolist() == values.argmax(axis=1).tolist()
        assert found.masks.sum(axis=1).tolist() == [1] * 10


def test_the_seconds_are_those_of_the_whole_solution() -> None:
    began = time.perf_counter()
    selection = solve(random_problem(0, 6, 5))
    assert 0 < selection.seconds <= time.perf_counter() - began
