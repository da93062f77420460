"""Local search: what it must reach from anywhere."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from selection_cases import problems, random_problem

from layerfed.selection import SelectionProblem
from layerfed.selection.oracle import ClientOracle
from layerfed.selection.search import PrimalSearch


def start(problem: SelectionProblem) -> tuple[SelectionProblem, PrimalSearch]:
    problem = problem.saturated()
    return problem, PrimalSearch(problem, ClientOracle(problem))


@given(problems())
@settings(max_examples=60, deadline=None)
def test_leaves_no_client_with_a_better_answer(problem: SelectionProblem) -> None:
    problem, search = start(problem)

    search.intensify(deadline=np.inf, target=np.inf)

    assert problem.feasible(search.masks)
    for client in range(problem.clients):
        for row in product((False, True), repeat=problem.layers):
            other = search.masks.copy()
            other[client] = row
            if problem.feasible(other):
                assert problem.objective(other) <= search.objective + 1e-9 * problem.magnitude


@pytest.mark.parametrize("relative", [0.1, 0.5, 2.0])
def test_settling_never_lowers_the_objective(relative: float) -> None:
    problem, search = start(random_problem(2, relative=relative))
    counts = np.full(problem.layers, 7.0)

    first = problem.objective(ClientOracle(problem).best(problem.values + search.slopes(counts)))
    settled = problem.objective(search.settle(counts))

    assert settled >= first
    assert search.objective >= settled


def test_the_incumbent_is_only_replaced_by_better_masks() -> None:
    problem, search = start(random_problem(2))
    good = ClientOracle(problem).best(problem.values)
    search.offer(good)

    search.offer(np.zeros_like(good))

    assert search.objective == max(problem.objective(good), 0.0)
