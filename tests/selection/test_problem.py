"""SelectionProblem and Selection: validation, the objective, budgets, JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from selection_cases import all_masks, pairwise_objective, problems, within_budgets

from layerfed.selection import Selection, SelectionProblem, solve

VALUES = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


def build(**changes: Any) -> SelectionProblem:
    fields: dict[str, Any] = {
        "values": VALUES,
        "costs": [1.0, 1.0, 1.0],
        "budgets": [1.0, 2.0],
        "consistency": 0.5,
    }
    return SelectionProblem(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": [[1.0, np.nan, 3.0], [4.0, 5.0, 6.0]]}, r"values\[0, 1\] is nan.*drop"),
        ({"values": [[1.0, np.inf, 3.0], [4.0, 5.0, 6.0]]}, r"values\[0, 1\] is inf.*drop"),
        ({"values": [1.0, 2.0, 3.0]}, r"values has shape \(3,\)"),
        ({"values": [[], []], "costs": []}, "at least one layer"),
        ({"values": [[1.0, 2.0], [3.0]]}, "values is not a rectangular array"),
        ({"costs": [1.0, 1.0]}, r"costs has shape \(2,\); expected \(3,\)"),
        ({"costs": [1.0, -2.0, 1.0]}, r"costs\[1\] is -2.0; expected 0 or more"),
        ({"budgets": [1.0]}, r"budgets has shape \(1,\); expected \(2,\)"),
        ({"budgets": [1.0, -1.0]}, r"budgets\[1\] is -1.0; expected 0 or more"),
        ({"budgets": [1.0, np.nan]}, r"budgets\[1\] is nan"),
        ({"consistency": np.inf}, "consistency is inf; expected a finite number"),
        ({"consistency": np.nan}, "consistency is nan"),
        ({"consistency": -1e308}, "so large that the objective is no finite number"),
        ({"values": [[1e308] * 3] * 2}, "so large that the objective is no finite number"),
        ({"depth_costs": [0.0, 1.0, 2.0]}, "depth_costs increases with the layer index"),
        ({"depth_costs": [2.0, 1.0]}, r"depth_costs has shape \(2,\)"),
        ({"depth_costs": [2.0, 1.0, -1.0]}, r"depth_costs\[2\] is -1.0"),
    ],
)
def test_refuses_with_name_value_and_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_cannot_be_changed_after_validation() -> None:
    problem = build()

    with pytest.raises(ValueError, match="read-only"):
        problem.values[0, 0] = np.nan


def test_does_not_freeze_the_callers_arrays() -> None:
    values = np.array(VALUES)

    build(values=values)
    values[0, 0] = 7.0

    assert values[0, 0] == 7.0


@given(problems())
@settings(deadline=None)
def test_objective_and_budgets_are_those_of_the_pairwise_form(problem: SelectionProblem) -> None:
    for masks in list(all_masks(problem))[::17]:
        expected = pairwise_objective(problem, masks)
        assert problem.objective(masks) == pytest.approx(expected, rel=1e-9, abs=1e-6)
        assert problem.feasible(masks) == within_budgets(problem, masks)


def test_spent_adds_the_depth_cost_of_the_lowest_layer_only() -> None:
    problem = build(costs=[1.0, 2.0, 3.0], depth_costs=[10.0, 5.0, 0.0])

    assert problem.spent([[0, 1, 1], [0, 0, 0]]).tolist() == [2.0 + 3.0 + 5.0, 0.0]


def test_rounding_does_not_make_a_client_miss_its_budget() -> None:
    problem = build(costs=[0.1, 0.2, 9.0], budgets=[0.3, 0.3])

    assert 0.1 + 0.2 > 0.3
    assert problem.feasible([[1, 1, 0], [1, 1, 0]])


def test_objective_refuses_masks_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"masks has shape \(1, 3\); expected \(2, 3\)"):
        build().objective([[1, 0, 0]])


def test_saturation_keeps_optimum_and_objective() -> None:
    problem = build(consistency=1e12, budgets=[1.0, 1.0])
    masks = [[0, 0, 1], [0, 0, 1]]

    saturated = problem.saturated()

    assert saturated.consistency < 1e3
    assert saturated.objective(masks) == problem.objective(masks) == 9.0


def test_reads_an_instance_and_writes_a_result_as_json() -> None:
    text = '{"values": [[1, 2], [3, 1]], "costs": [1, 1], "budgets": [1, 1], "consistency": 0}'

    result = json.loads(json.dumps(solve(SelectionProblem.from_json(json.loads(text))).to_json()))

    assert result["masks"] == [[0, 1], [1, 0]]
    assert result["objective"] == result["bound"] == 5.0
    assert result["gap"] == 0.0
    assert set(result) == {"masks", "objective", "bound", "gap", "solver", "seconds"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"values": [[1]], "costs": [1], "budgets": [1]}, r"lacks \['consistency'\]"),
        (
            {"values": [[1]], "costs": [1], "budgets": [1], "consistency": 1, "budget": 2},
            r"unknown keys \['budget'\]",
        ),
        (
            {"values": [[1]], "costs": [1], "budgets": [1], "consistency": "much"},
            "consistency is 'much'",
        ),
        (
            {"values": [["a"]], "costs": [1], "budgets": [1], "consistency": 1},
            "values is not a rectangular array of numbers",
        ),
        ([1, 2], "the instance is a list"),
    ],
)
def test_refuses_a_malformed_instance(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectionProblem.from_json(data)


def test_gap_is_relative_to_the_larger_and_ignores_rounding() -> None:
    problem = build(consistency=0.0)

    assert problem.relative_gap(9.0, 10.0) == pytest.approx(0.1)
    assert problem.relative_gap(0.0, 10.0) == 1.0
    assert problem.relative_gap(10.0, 10.0 + 1e-13) == 0.0


def test_a_certificate_never_puts_the_bound_below_the_objective() -> None:
    masks = np.array([[0, 0, 1], [0, 1, 1]], dtype=bool)

    selection = Selection.certified(build(consistency=0.0), masks, 13.9999, "test", 0.0)

    assert selection.bound == selection.objective == 14.0
    assert selection.gap == 0.0


def test_the_gap_to_an_unknown_bound_is_infinite() -> None:
    problem = SelectionProblem(np.ones((1, 2)), np.ones(2), np.ones(1), 0.0)
    assert problem.relative_gap(1.0, np.inf) == np.inf
