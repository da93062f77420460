"""The Lagrangian bound itself, before anything clamps or closes it."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import brute_force, problems

from layerfed.selection import SelectionProblem
from layerfed.selection.bound import Relaxation, penalties_of, relax
from layerfed.selection.knapsack import ClientOracle


def relaxation_of(problem: SelectionProblem) -> Relaxation:
    problem = problem.saturated()
    return relax(problem, ClientOracle(problem), np.zeros(problem.layers), penalties_of(problem))


def anywhere(relaxation: Relaxation, seed: int) -> np.ndarray:
    steps = np.random.default_rng(seed).normal(scale=2.0, size=relaxation.start.shape)
    return np.maximum(relaxation.start + steps, relaxation.floor)


@given(problems(), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_bounds_the_optimum_at_any_prices(problem: SelectionProblem, seed: int) -> None:
    relaxation = relaxation_of(problem)

    bound = relaxation.evaluate(anywhere(relaxation, seed)).bound

    assert bound >= brute_force(problem).objective - 1e-9 * problem.magnitude


@given(problems(), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_the_gradient_supports_the_bound_from_below(problem: SelectionProblem, seed: int) -> None:
    relaxation = relaxation_of(problem)
    here, there = anywhere(relaxation, seed), anywhere(relaxation, seed + 1)
    point = relaxation.evaluate(here)

    tangent = point.bound + float((point.gradient * (there - here)).sum())

    # At the floor the gradient is projected: moving up from there may only raise the bound.
    projected = (here <= relaxation.floor) & (point.gradient == 0)
    if not projected.any():
        assert relaxation.evaluate(there).bound >= tangent - 1e-7 * (1 + problem.magnitude)
