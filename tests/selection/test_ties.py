"""Ties: one documented answer, whoever solves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from selection_cases import brute_force, problems

from layerfed.selection import SelectionProblem, Solver, canonical, solve

SOLVERS: list[Solver] = ["auto", "lagrangian", "milp"]


@given(problems(tied=True))
@settings(max_examples=50, deadline=None)
def test_every_solver_gives_the_canonical_optimum(problem: SelectionProblem) -> None:
    expected = brute_force(problem).canonical

    for solver in SOLVERS:
        selection = solve(problem, solver=solver, gap=0.0)
        if selection.gap <= 1e-9:
            np.testing.assert_array_equal(selection.masks, expected)
        else:  # only the Lagrangian may leave a gap, and then promises nothing
            assert solver == "lagrangian"


@given(problems(tied=True))
@settings(max_examples=30, deadline=None)
def test_the_integer_program_breaks_ties_like_the_enumeration(problem: SelectionProblem) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canonical, "ENUMERATED", 0)
        selection = solve(problem, gap=0.0)

    np.testing.assert_array_equal(selection.masks, brute_force(problem).canonical)


def test_equal_layers_go_to_the_one_nearer_the_output() -> None:
    problem = SelectionProblem(np.ones((3, 5)), np.ones(5), np.full(3, 2.0), 0.1)

    for solver in SOLVERS:
        assert solve(problem, solver=solver).masks.tolist() == [[False] * 3 + [True] * 2] * 3


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
