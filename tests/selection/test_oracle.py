"""Best responses: all three exact methods against enumeration."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from selection_cases import brute_force, problems, random_problem

from layerfed.selection import SelectionProblem, oracle
from layerfed.selection.oracle import ClientOracle


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


@given(problems())
@settings(deadline=None)
def test_pareto_search_is_exact(problem: SelectionProblem) -> None:
    problem = alone(problem)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "ENUMERATION_LAYERS", 0)
        masks = ClientOracle(problem).best(problem.values)

    assert problem.feasible(masks)
    assert problem.objective(masks) == pytest.approx(brute_force(problem).objective, abs=1e-9)


@pytest.mark.parametrize("depth", [False, True])
def test_pareto_search_agrees_with_enumeration_at_twelve_layers(
    depth: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = alone(random_problem(3, cost="parameters", depth=depth))

    enumerated = ClientOracle(problem).best(problem.values)
    monkeypatch.setattr(oracle, "ENUMERATION_LAYERS", 0)
    searched = ClientOracle(problem).best(problem.values)

    assert problem.objective(searched) == pytest.approx(problem.objective(enumerated))


def test_responds_for_a_slice_of_the_clients() -> None:
    problem = random_problem(4, cost="parameters", depth=True)
    responses = ClientOracle(problem)

    whole = responses.best(problem.values)
    part = responses.best(problem.values[5:7], slice(5, 7))

    np.testing.assert_array_equal(part, whole[5:7])
