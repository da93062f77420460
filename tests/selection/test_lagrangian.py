"""Branching on counts: where the bound alone mixes picking alone with picking together."""

from __future__ import annotations

import numpy as np
import pytest
from selection_cases import random_problem, raw_consistency

from layerfed.selection import SelectionProblem, lagrangian, solve_lagrangian
from layerfed.selection.bound import Descent, descend, penalties_of, relax
from layerfed.selection.knapsack import ClientOracle
from layerfed.selection.lagrangian import branch
from layerfed.selection.search import PrimalSearch


def transition(seed: int, n: int = 60, layers: int = 12) -> SelectionProblem:
    """Independent gains near the λ at which picking together becomes as good as alone."""
    values = np.random.default_rng(seed).lognormal(size=(n, layers))
    costs, budgets = np.ones(layers), np.full(n, 4.0)
    raw = raw_consistency(values, costs, budgets, 0.8)
    return SelectionProblem(values, costs, budgets, raw)


def root(problem: SelectionProblem) -> tuple[ClientOracle, PrimalSearch, Descent]:
    oracle = ClientOracle(problem)
    search = PrimalSearch(problem, oracle)
    search.settle(np.zeros(problem.layers))
    relaxation = relax(problem, oracle, np.zeros(problem.layers), penalties_of(problem))
    return oracle, search, descend(problem, search, relaxation, 600)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_closes_gaps_that_the_bound_alone_cannot(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = transition(seed)
    closed = solve_lagrangian(problem)
    monkeypatch.setattr(lagrangian, "branch", lambda *arguments: arguments[-1])
    alone = solve_lagrangian(problem)

    assert alone.gap > 1e-4  # otherwise this instance tests nothing
    assert closed.gap <= 1e-9
    assert alone.objective - 1e-9 <= closed.objective <= alone.bound


def test_parts_cover_the_optimum_and_bound_it() -> None:
    problem = transition(2)
    oracle, search, whole = root(problem)

    parts = branch(problem, oracle, search, [whole])

    optimum = search.masks.sum(axis=0)
    layers = np.arange(problem.layers)
    assert any(np.isfinite(part.relaxation.penalties[layers, optimum]).all() for part in parts)
    assert parts[0].bound == max(part.bound for part in parts)
    assert search.objective <= parts[0].bound + 1e-9 < whole.bound


def test_a_bound_without_mixture_is_not_split() -> None:
    problem = random_problem(2, 8, 8, relative=-1.0, cost="parameters")  # λ < 0 never mixes
    oracle, search, whole = root(problem)

    assert branch(problem, oracle, search, [whole]) == [whole]


def test_no_split_begins_after_the_deadline() -> None:
    problem = transition(2)
    oracle, search, whole = root(problem)
    search.deadline = -np.inf

    assert branch(problem, oracle, search, [whole]) == [whole]


def test_counts_that_budgets_rule_out_are_forbidden() -> None:
    problem = SelectionProblem(np.ones((3, 2)), [1.0, 9.0], [1.0, 1.0, 9.0], 0.5)

    allowed = np.isfinite(penalties_of(problem))

    assert allowed.tolist() == [[True] * 4, [True, True, False, False]]
