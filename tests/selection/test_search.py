"""Feasible masks, repaired from those of the bound."""

from __future__ import annotations

import numpy as np
import pytest
from selection_cases import random_problem

from layerfed.selection import SelectionProblem
from layerfed.selection.knapsack import ClientOracle
from layerfed.selection.search import PrimalSearch


def start(problem: SelectionProblem) -> tuple[SelectionProblem, PrimalSearch]:
    problem = problem.saturated()
    return problem, PrimalSearch(problem, ClientOracle(problem))


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
