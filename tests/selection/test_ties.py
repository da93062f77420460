"""Ties: the preferred selection is chosen, and the same instance always gets the same masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from selection_cases import brute_force, problems, random_problem

from layerfed.selection import SelectionProblem, Solver, solve
from layerfed.selection.problem import PROVEN

SOLVERS: list[Solver] = ["auto", "lagrangian", "milp"]


@given(problems(tied=True))
@settings(max_examples=60, deadline=None)
def test_every_solver_gives_an_optimum_that_no_simple_change_improves(
    problem: SelectionProblem,
) -> None:
    optima = brute_force(problem).optima

    for solver in SOLVERS:
        selection = solve(problem, solver=solver, gap=0.0)
        if selection.gap > PROVEN:  # only the Lagrangian may leave a gap, and then promises nothing
            assert solver == "lagrangian"
            continue
        assert any(np.array_equal(selection.masks, masks) for masks in optima)
        for masks in optima:
            if (masks != selection.masks).any(axis=1).sum() == 1:
                assert masks.sum() >= selection.masks.sum()


@given(problems(tied=True))
@settings(max_examples=30, deadline=None)
def test_the_same_instance_gives_the_same_masks(problem: SelectionProblem) -> None:
    for solver in SOLVERS:
        first, second = (solve(problem, solver=solver).masks for _ in range(2))
        np.testing.assert_array_equal(first, second)


def test_equal_layers_go_to_the_one_nearer_the_output() -> None:
    problem = SelectionProblem(np.ones((3, 5)), np.ones(5), np.full(3, 2.0), 0.1)

    for solver in SOLVERS:
        assert solve(problem, solver=solver).masks.tolist() == [[False] * 3 + [True] * 2] * 3


@pytest.mark.parametrize("consistency", [0.0, 0.1])
def test_a_layer_that_is_better_by_little_is_no_tie(consistency: float) -> None:
    """A preference is a bonus of 1e-9 during the search, and must not win over a difference below it."""
    values = np.array([[1.0 + 1e-10, 1.0], [1.0 + 1e-10, 1.0]])
    problem = SelectionProblem(values, np.ones(2), np.ones(2), consistency)

    assert solve(problem).masks.tolist() == [[True, False], [True, False]]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_client_alone_takes_the_equal_layer_nearer_the_output(solver: Solver) -> None:
    values = [[3.0, 3.0, 1.0], [9.0, 2.0, 1.0]]
    problem = SelectionProblem(values, np.ones(3), [1.0, 1.0], 0.0)

    assert solve(problem, solver=solver).masks.tolist() == [
        [False, True, False],
        [True, False, False],
    ]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_layer_without_gain_is_left_alone(solver: Solver) -> None:
    problem = SelectionProblem([[0.0, 2.0, 0.0], [0.0, 2.0, 0.0]], np.ones(3), [3.0, 3.0], 0.5)

    assert solve(problem, solver=solver).masks.tolist() == [[False, True, False]] * 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_layer_without_gain_is_taken_where_it_saves_a_penalty(solver: Solver) -> None:
    problem = SelectionProblem([[5.0], [5.0], [0.0]], [1.0], [1.0, 1.0, 1.0], 1.0)

    assert solve(problem, solver=solver).masks.all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_round_in_which_everything_is_equal(solver: Solver) -> None:
    problem = SelectionProblem(np.ones((10, 8)), np.ones(8), np.full(10, 2.0), 0.01)

    masks = solve(problem, solver=solver, time_limit=60.0).masks

    np.testing.assert_array_equal(masks, np.tile(np.arange(8) >= 6, (10, 1)))


@pytest.mark.parametrize("cost", ["unit", "parameters"])
def test_layers_that_are_copies_of_each_other_go_to_the_later_ones(cost: str) -> None:
    half = random_problem(4, 12, 6, cost=cost)
    values, costs = np.repeat(half.values, 2, axis=1), np.repeat(half.costs, 2)
    problem = SelectionProblem(values, costs, half.budgets, half.consistency)

    masks = solve(problem).masks

    assert not np.any(masks[:, 0::2].any(axis=0) & ~masks[:, 1::2].any(axis=0))
