"""Best responses: every exact method against enumeration."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from selection_cases import brute_force, problems, random_problem

from layerfed.selection import SelectionProblem, knapsack
from layerfed.selection.knapsack import ClientOracle, Grid


def alone(problem: SelectionProblem) -> SelectionProblem:
    return SelectionProblem(
        problem.values, problem.costs, problem.budgets, 0.0, problem.depth_costs
    )


@given(problems())
@settings(deadline=None)
def test_best_response_is_exact(problem: SelectionProblem) -> None:
    problem = alone(problem)

    masks = ClientOracle(problem).best(problem.values)

    assert problem.feasible(masks)
    assert problem.objective(masks) == pytest.approx(brute_force(problem).objective, abs=1e-9)


METHODS = ["grid", "pareto"]


def force(method: str, patch: pytest.MonkeyPatch) -> None:
    """Make the oracle use one method, whatever the costs would allow."""
    patch.setattr(knapsack, "ENUMERATION_LAYERS", 0)
    if method == "pareto":
        patch.setattr(knapsack, "MOST_CELLS", -1)


@pytest.mark.parametrize("method", METHODS)
@given(problem=problems())
@settings(deadline=None)
def test_knapsacks_are_exact(method: str, problem: SelectionProblem) -> None:
    problem = alone(problem)

    with pytest.MonkeyPatch.context() as patch:
        force(method, patch)
        masks = ClientOracle(problem).best(problem.values)

    assert problem.feasible(masks)
    assert problem.objective(masks) == pytest.approx(brute_force(problem).objective, abs=1e-9)


@pytest.mark.parametrize("table", [1, 2**24])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("depth", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_knapsacks_agree_with_enumeration_at_twelve_layers(
    seed: int, depth: bool, method: str, table: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = alone(random_problem(seed, cost="parameters"))
    if depth:
        fall = np.random.default_rng(seed).integers(0, 20, size=problem.layers)[::-1].cumsum()[::-1]
        problem = replace(problem, depth_costs=fall.astype(float))

    enumerated = ClientOracle(problem).best(problem.values)
    force(method, monkeypatch)
    monkeypatch.setattr(knapsack, "TABLE_ENTRIES", table)  # one client at a time, or all at once
    searched = ClientOracle(problem).best(problem.values)

    assert problem.feasible(searched)
    assert problem.objective(searched) == pytest.approx(problem.objective(enumerated))


def test_the_grid_is_the_coarsest_that_loses_nothing() -> None:
    problem = alone(SelectionProblem([[1.0, 1.0, 1.0]], [600.0, 900.0, 9e9], [2000.0], 0.0))

    grid = Grid.of(problem)

    assert grid is not None
    assert grid.costs.tolist() == [[2, 3, 6]]  # the last one is beyond the budget
    assert grid.budgets.tolist() == [5]  # both layers; more would buy nothing


@pytest.mark.parametrize("cost", [0.5, 1e300])
def test_costs_between_the_lines_have_no_grid(cost: float) -> None:
    problem = alone(SelectionProblem([[1.0, 1.0]], [cost, 1.0], [2e300], 0.0))

    assert Grid.of(problem) is None


def test_responds_for_a_slice_of_the_clients() -> None:
    problem = random_problem(4, cost="parameters", depth=True)
    responses = ClientOracle(problem)

    whole = responses.best(problem.values)
    part = responses.best(problem.values[5:7], slice(5, 7))

    np.testing.assert_array_equal(part, whole[5:7])
