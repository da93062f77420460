"""A client's exact best response: the affordable set of layers with the largest total score.

Each client has a knapsack whose scores change between calls and whose costs do not. The method follows
from the costs:

- equal costs: a sort gives the best layers that fit;
- few layers: a matrix product scores all sets of layers at once;
- costs on a grid, whole multiples of one unit: dynamic programming over the budget, for all clients in
  one pass over the layers (Bellman, *Dynamic Programming*, 1957);
- any other costs: for each client the Pareto-optimal (cost, score) pairs, while layers are added one by
  one (Nemhauser & Ullmann, *Discrete dynamic programming and capital allocation*, 1969).

With depth costs, layers are added from the output down. At each layer the best set so far is charged
the depth cost of that layer, as if it were the set's lowest. A set whose lowest layer is nearer the
output is charged too much there, and never too little, because ``D`` does not increase with the layer
index. At its own lowest layer it was charged exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layerfed.selection.problem import BoolArray, FloatArray, SelectionProblem

#: Largest L for which all 2^L sets are scored at once; 4,096 sets cost less than one sort.
ENUMERATION_LAYERS = 12

#: Largest budget of the dynamic program, in units of the grid.
MOST_CELLS = 4096

#: Largest number of entries of the dynamic program's table at once, about 16 MB.
TABLE_ENTRIES = 2**24


@dataclass(frozen=True, eq=False)
class Grid:
    """Costs, depth costs (n, L) and budgets (n,) in whole units.

    An unaffordable layer costs one unit more than the budget.
    """

    costs: NDArray[np.int64]
    depth: NDArray[np.int64]
    budgets: NDArray[np.int64]

    @classmethod
    def of(cls, problem: SelectionProblem) -> Grid | None:
        """Return the coarsest exact grid of a problem, or None if that is too fine."""
        if problem.clients == 0:
            return None
        able = problem.affordable
        costs = np.where(able, problem.cost_matrix, 0.0)
        depth = np.where(able, problem.depth_matrix, 0.0)
        if np.any(costs % 1) or np.any(depth % 1) or max(costs.max(), depth.max()) > 2**53:
            return None
        unit = int(np.gcd.reduce(np.concatenate([costs, depth]).astype(np.int64), axis=None)) or 1
        # A budget above the cost of all layers is as good as that cost.
        limits = np.minimum(problem.limits, costs.sum(axis=1) + depth.max(axis=1))
        budgets = np.floor(limits / unit)
        if budgets.max() > MOST_CELLS:
            return None
        too_dear = budgets[:, None] + 1
        return cls(
            np.where(able, costs / unit, too_dear).astype(np.int64),
            np.where(able, depth / unit, too_dear).astype(np.int64),
            budgets.astype(np.int64),
        )


class ClientOracle:
    """The best responses of all clients under one problem's costs and budgets, for any scores."""

    def __init__(self, problem: SelectionProblem) -> None:
        self._problem = problem
        costs, layers = problem.cost_matrix, problem.layers
        has_depth = bool(np.any(problem.depth_matrix > 0))
        self._starts = layers if has_depth else 1
        self._room = _room(problem) if np.all(costs == costs[:, :1]) else None
        self._sets: BoolArray | None = None
        self._grid: Grid | None = None
        if self._room is not None:
            return
        if layers <= ENUMERATION_LAYERS:
            self._enumerate()
            return
        self._grid = Grid.of(problem)
        cheapest = np.cumsum(np.sort(costs, axis=1), axis=1)
        self._most = (cheapest <= problem.limits[:, None]).sum(axis=1).astype(np.float64)

    @property
    def room(self) -> FloatArray | None:
        """The number of layers that each client affords, shape (n,), or None if costs differ.

        It is None with depth costs too. Pricing budgets that are such numbers leaves no knapsack gap.
        """
        return None if self._room is None or self._starts > 1 else self._room[:, 0]

    def best(self, scores: FloatArray, clients: slice = slice(None)) -> BoolArray:
        """Return each client's affordable set with the largest total score, as masks like `scores`.

        `scores` (n, L) has a row for each of `clients`. A layer with a score of 0 or less is never
        picked.
        """
        scores = np.where(self._problem.affordable[clients], scores, 0.0)
        if self._room is not None:
            return self._best_of_equal(scores, self._room[clients])
        if self._sets is not None:
            winner = (scores @ self._weights + self._excluded[clients]).argmax(axis=1)
            return np.asarray(self._sets[winner] & (scores > 0))
        chosen = _top(scores, self._most[clients])
        rows = np.arange(self._problem.clients)[clients]
        # If the K highest scores fit, they are best; they mostly do.
        limits = self._problem.limits[rows]
        hard = np.flatnonzero(self._problem.spent(chosen, rows) > limits)
        if self._grid is None:
            for row in hard:
                chosen[row] = _pareto(self._problem, scores[row], rows[row])
            return chosen
        if len(hard):
            cells = int(self._grid.budgets[rows[hard]].max()) + 1
            step = max(1, TABLE_ENTRIES // (scores.shape[1] * cells))
            for first in range(0, len(hard), step):
                part = hard[first : first + step]
                chosen[part] = _dynamic(self._grid, scores[part], rows[part])
        return chosen

    def _best_of_equal(self, scores: FloatArray, room: FloatArray) -> BoolArray:
        best = _top(scores, room[:, 0])
        best_total = np.where(best, scores, 0.0).sum(axis=1)
        for start in range(1, self._starts):
            chosen = _top(scores[:, start:], room[:, start])
            total = np.where(chosen, scores[:, start:], 0.0).sum(axis=1)
            better = total > best_total
            best[better] = False
            best[better, start:] = chosen[better]
            best_total[better] = total[better]
        return best

    def _enumerate(self) -> None:
        problem, layers = self._problem, self._problem.layers
        self._sets = (np.arange(2**layers)[:, None] >> np.arange(layers) & 1).astype(bool)
        self._weights = self._sets.astype(np.float64).T
        depth = problem.depth_matrix[:, self._sets.argmax(axis=1)] * self._sets.any(axis=1)
        costs = problem.cost_matrix @ self._weights + depth
        self._excluded = np.where(costs <= problem.limits[:, None], 0.0, -np.inf)


def _room(problem: SelectionProblem) -> FloatArray:
    """Return, for equal costs, the number of layers that fit if none is below ``s``, shape (n, L)."""
    left, cost = problem.limits[:, None] - problem.depth_matrix, problem.cost_matrix
    with np.errstate(divide="ignore", invalid="ignore"):
        room = np.where(cost > 0, np.floor(left / cost), np.inf)
    return np.clip(np.where(left >= 0, room, 0), 0, problem.layers)


def _dynamic(grid: Grid, scores: FloatArray, rows: NDArray[np.intp]) -> BoolArray:
    """Return best sets by dynamic programming: totals by budget from the output down, then a walk back.

    `scores` has a row for each of the clients `rows`; scores of 0 or less are never picked.
    """
    n, layers = scores.shape
    each = np.arange(n)
    budgets = grid.budgets[rows]
    size = int(budgets.max()) + 1
    costs = np.minimum(grid.costs[rows], size)
    left = budgets[:, None] - grid.depth[rows]
    # The left half stands for budgets below 0, in which nothing fits.
    table = np.full((n, 2 * size), -np.inf)
    table[:, size:] = 0.0
    totals = table[:, size:]
    places = (each * 2 * size)[:, None] + np.arange(size, 2 * size)
    taken = np.zeros((layers, n, size), dtype=bool)
    best, lowest, room = np.zeros(n), np.full(n, layers), budgets.copy()
    for layer in range(layers - 1, -1, -1):
        if not np.any(scores[:, layer] > 0):
            continue
        with_layer = table.ravel().take(places - costs[:, layer : layer + 1])
        with_layer += np.where(scores[:, layer] > 0, scores[:, layer], -np.inf)[:, None]
        np.greater(with_layer, totals, out=taken[layer])
        np.maximum(with_layer, totals, out=totals)
        total = np.where(left[:, layer] >= 0, totals[each, np.maximum(left[:, layer], 0)], 0.0)
        better = total > best
        best[better], lowest[better], room[better] = total[better], layer, left[better, layer]
    chosen = np.zeros(scores.shape, dtype=bool)
    for layer in range(layers):
        take = taken[layer, each, room] & (layer >= lowest)
        chosen[take, layer] = True
        room = room - np.where(take, costs[:, layer], 0)
    return chosen


def _pareto(problem: SelectionProblem, scores: FloatArray, client: int) -> BoolArray:
    """Return the best set of one client, `scores` of shape (L,), from its undominated pairs."""
    costs, left = problem.cost_matrix[client], problem.limits[client] - problem.depth_matrix[client]
    cost, score = np.zeros(1), np.zeros(1)
    sets = np.zeros((1, len(scores)), dtype=bool)
    best, best_score = sets[0], 0.0
    for layer in np.flatnonzero(scores > 0)[::-1]:
        added = sets.copy()
        added[:, layer] = True
        cost = np.concatenate([cost, cost + costs[layer]])
        score = np.concatenate([score, score + scores[layer]])
        fits = np.flatnonzero(cost <= left[layer])
        order = fits[np.lexsort((-score[fits], cost[fits]))]
        before = np.maximum.accumulate(np.concatenate([[-np.inf], score[order]]))[:-1]
        kept = order[score[order] > before]
        cost, score, sets = cost[kept], score[kept], np.concatenate([sets, added])[kept]
        if len(score) and score[-1] > best_score:
            best, best_score = sets[-1], score[-1]
    return np.asarray(best)


def _top(scores: FloatArray, room: FloatArray) -> BoolArray:
    """Mark the `room` largest positive scores of each row."""
    counts = np.minimum(room, scores.shape[1]).astype(np.intp)
    return largest(scores, -np.sort(-scores, axis=1), counts) & (scores > 0)


def largest(entries: FloatArray, ranked: FloatArray, counts: NDArray[np.intp]) -> BoolArray:
    """Mark the `counts` largest entries of each row; of equal entries, those further left.

    `ranked` holds the rows in falling order. Entries are compared with the last value that is taken,
    because sorting positions costs several times as much as sorting values. Only rows in which that
    value is tied need positions.
    """
    taken = counts[:, None]
    last = np.take_along_axis(ranked, np.maximum(taken - 1, 0), axis=1)
    chosen = (entries >= last) & (taken > 0)
    tied = np.flatnonzero(chosen.sum(axis=1) > counts)
    if len(tied):
        order = np.argsort(-entries[tied], axis=1, kind="stable")
        first = np.arange(entries.shape[1])[None, :] < taken[tied]
        rows = np.zeros(order.shape, dtype=bool)
        np.put_along_axis(rows, order, first, axis=1)
        chosen[tied] = rows
    return np.asarray(chosen)
