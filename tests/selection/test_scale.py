"""The scale-free λ."""

from __future__ import annotations

import numpy as np
import pytest
from selection_cases import random_problem

from layerfed.selection import SelectionProblem, limit_weights, scale_consistency, solve


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


def test_honest_gains_set_the_scale_by_their_plain_mean() -> None:
    values = np.random.default_rng(0).uniform(1.0, 3.0, size=(11, 6))

    raw = scale_consistency(values, np.ones(6), np.full(11, 2.0), 1.0)

    assert raw == pytest.approx(np.sort(values, axis=1)[:, -2:].mean() / 11)


@pytest.mark.parametrize("claim", [1e3, 1e12, 1e300])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_one_clients_claim_does_not_set_the_scale_of_everyone(n: int, claim: float) -> None:
    values = np.ones((n, 4))
    honest = scale_consistency(values, np.ones(4), np.full(n, 2.0), 1.0)
    values[n // 2] = claim

    raw = scale_consistency(values, np.ones(4), np.full(n, 2.0), 1.0)

    assert honest <= raw <= honest * (1 + 2.0 / n + 1e-9)


def test_just_under_half_of_the_clients_cannot_push_the_scale() -> None:
    values = np.ones((9, 4))
    values[:4] = 1e12

    raw = scale_consistency(values, np.ones(4), np.ones(9), 1.0)

    assert raw <= 3.0 / 9


def test_an_enormous_claim_leaves_the_other_clients_choices_alone() -> None:
    values = random_problem(9, 11, 12).values.copy()
    costs, budgets = np.ones(12), np.full(11, 2.0)

    def masks(table: np.ndarray) -> np.ndarray:
        problem, _ = limit_weights(SelectionProblem(table, costs, budgets, 0.0))
        raw = scale_consistency(problem.values, costs, budgets, 0.3)
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
