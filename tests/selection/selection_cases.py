"""Instances of (P1), and their solutions, found without the code under test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
from hypothesis import strategies as st

from layerfed.selection import SelectionProblem, mean_gain

#: Largest number of entries of an instance that is enumerated: at most 4,096 masks.
MOST_ENTRIES = 12


def raw_consistency(
    values: Any, costs: Any, budgets: Any, relative: float, depth_costs: Any = None
) -> float:
    """Return λ of a relative one, as `ILP` sets it: in mean gains over the clients."""
    problem = SelectionProblem(values, costs, budgets, 0.0, depth_costs)
    return relative * mean_gain(problem) / max(problem.clients, 1)


def pairwise_objective(problem: SelectionProblem, masks: np.ndarray) -> float:
    """Return (P1)'s objective as the paper writes it, pair by pair."""
    dissent = sum(np.abs(a - b).sum() for a, b in combinations(masks.astype(int), 2))
    return float((problem.values * masks).sum() - problem.consistency * dissent)


def within_budgets(problem: SelectionProblem, masks: np.ndarray) -> bool:
    costs = np.broadcast_to(problem.costs, problem.values.shape)
    for i, row in enumerate(masks):
        spent = sum(costs[i, layer] for layer in np.flatnonzero(row))
        if problem.depth_costs is not None and row.any():
            depth = np.broadcast_to(problem.depth_costs, problem.values.shape)
            spent += depth[i, np.flatnonzero(row)[0]]
        if spent > problem.budgets[i] + 1e-9 * problem.budgets[i]:
            return False
    return True


def all_masks(problem: SelectionProblem) -> Iterator[np.ndarray]:
    shape = problem.values.shape
    assert shape[0] * shape[1] <= MOST_ENTRIES
    for bits in product((False, True), repeat=shape[0] * shape[1]):
        yield np.array(bits, dtype=bool).reshape(shape)


@dataclass(frozen=True)
class Truth:
    """Return the optimum by enumeration, and all masks that reach it."""

    objective: float
    optima: list[np.ndarray]


def brute_force(problem: SelectionProblem) -> Truth:
    scored = [
        (pairwise_objective(problem, masks), masks)
        for masks in all_masks(problem)
        if within_budgets(problem, masks)
    ]
    best = max(objective for objective, _ in scored)
    rewards = max(-problem.consistency, 0.0) * problem.clients**2 * problem.layers
    tolerance = 1e-12 * (float(np.abs(problem.values).sum()) + rewards)
    return Truth(best, [masks for objective, masks in scored if objective >= best - tolerance])


@st.composite
def problems(draw: st.DrawFn, *, tied: bool = False, depth: bool | None = None) -> SelectionProblem:
    """Small instances of every kind; `tied` ones have few distinct numbers."""
    n = draw(st.integers(1, 4), label="clients")
    layers = draw(st.integers(1, min(4, MOST_ENTRIES // n)), label="layers")
    whole = st.integers(-1, 3).map(float)
    value = whole if tied or draw(st.booleans()) else st.floats(-1.0, 5.0, width=32)

    def rows(entry: st.SearchStrategy[float]) -> np.ndarray:
        row = st.lists(entry, min_size=layers, max_size=layers)
        return np.array(draw(st.lists(row, min_size=n, max_size=n)))

    cost = draw(st.sampled_from(["unit", "shared", "own"]), label="costs")
    costs = np.ones(layers) if cost == "unit" else rows(st.integers(0, 5).map(float))
    depth_costs = None
    if draw(st.booleans()) if depth is None else depth:
        depth_costs = -np.sort(-rows(st.integers(0, 3).map(float)), axis=1)
    budgets = np.array(draw(st.lists(st.integers(0, 9).map(float), min_size=n, max_size=n)))
    lam = draw(st.sampled_from([0.0, 0.25, 1.0, 50.0, 1e9, -0.25, -1.0, -5.0]), label="λ")
    return SelectionProblem(
        rows(value), costs[0] if cost == "shared" else costs, budgets, lam, depth_costs
    )


def random_problem(
    seed: int,
    n: int = 20,
    layers: int = 12,
    *,
    relative: float = 0.5,
    cost: str = "unit",
    depth: bool = False,
) -> SelectionProblem:
    """A round's size: gradient norms that differ by client and by layer, mixed budgets."""
    rng = np.random.default_rng(seed)
    values = rng.lognormal(size=(1, layers)) * rng.lognormal(sigma=0.7, size=(n, layers))
    budgets = rng.integers(1, 5, size=n).astype(float)
    costs = np.ones(layers)
    if cost == "parameters":
        costs, budgets = rng.integers(1, 51, size=layers).astype(float), 25.0 * budgets
    depth_costs = None
    if depth:
        depth_costs = np.linspace(1.0, 0.0, layers) * costs.mean()
    return SelectionProblem(values, costs, budgets, relative * values.mean() * 2 / n, depth_costs)
