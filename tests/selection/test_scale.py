"""The scale-free λ."""

from __future__ import annotations

import numpy as np
import pytest
from selection_cases import random_problem

from layerfed.selection import SelectionProblem, scale_consistency, solve


def test_is_relative_to_the_mean_selected_gain_divided_by_the_clients() -> None:
    values = [[1.0, 5.0, 3.0], [4.0, 2.0, 0.0]]

    raw = scale_consistency(values, [1.0, 1.0, 1.0], [2.0, 1.0], 0.5)

    assert raw == 0.5 * ((5.0 + 3.0 + 4.0) / 3) / 2


def test_selection_does_not_depend_on_the_unit_of_the_gradients() -> None:
    base = random_problem(9)
    masks = []
    for unit in (1.0, 1e-9, 1e9):
        values = base.values * unit
        raw = scale_consistency(values, base.costs, base.budgets, 1.0)
        masks.append(solve(SelectionProblem(values, base.costs, base.budgets, raw)).masks)

    np.testing.assert_array_equal(masks[0], masks[1])
    np.testing.assert_array_equal(masks[0], masks[2])


def test_keeps_the_sign_and_is_zero_where_nothing_is_affordable() -> None:
    assert scale_consistency([[1.0], [1.0]], [1.0], [1.0, 1.0], -2.0) == -1.0
    assert scale_consistency([[1.0]], [2.0], [1.0], 1.0) == 0.0
    assert scale_consistency(np.zeros((0, 2)), [1.0, 1.0], [], 1.0) == 0.0


def test_respects_depth_costs() -> None:
    raw = scale_consistency([[9.0, 1.0]], [1.0, 1.0], [2.0], 1.0, depth_costs=[2.0, 0.0])

    assert raw == 1.0


def test_refuses_a_scale_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="relative consistency is inf"):
        scale_consistency([[1.0]], [1.0], [1.0], float("inf"))
