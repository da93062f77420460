"""Exact knapsacks of many clients at once: the affordable layers with the largest total score.

Two methods, by what the costs allow. Both see only the layers that can matter: a client that has
room for at most K layers never needs one that K others beat in score and cost (and in depth).

- Costs on a grid, that is, whole multiples of one unit: dynamic programming over the budget
  (Bellman, *Dynamic Programming*, 1957), for all clients in one pass over the layers.
- Any costs: per client, the Pareto-optimal (cost, score) pairs while adding one layer at a time
  (Nemhauser & Ullmann, *Discrete dynamic programming and capital allocation*, 1969).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layerfed.selection.problem import BoolArray, FloatArray, SelectionProblem

#: Largest budget, in units of the grid, that the dynamic program is used for.
MOST_CELLS = 4096

#: Entries of the dynamic program's table held at once, some 16 MB.
TABLE_ENTRIES = 2**24


@dataclass(frozen=True, eq=False)
class Grid:
    """Costs, depth costs (n, L) and budgets (n,) in whole units; what is too dear costs too much."""

    costs: NDArray[np.int64]
    depth: NDArray[np.int64]
    budgets: NDArray[np.int64]

    @classmethod
    def of(cls, problem: SelectionProblem) -> Grid | None:
        """Put the problem on the coarsest grid that loses nothing; None where that is too fine."""
        able = problem.affordable
        costs = np.where(able, problem.cost_matrix, 0.0)
        depth = np.where(able, problem.depth_matrix, 0.0)
        if np.any(costs % 1) or np.any(depth % 1) or max(costs.max(), depth.max()) > 2**53:
            return None
        unit = int(np.gcd.reduce(np.concatenate([costs, depth]).astype(np.int64), axis=None)) or 1
        # More than all layers is as good as all layers.
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


class Knapsacks:
    """Best responses of all clients of one problem, for scores that change between calls.

    Parameters
    ----------
    problem : SelectionProblem
        Supplies costs, depth costs and budgets; its values and λ are not used.
    """

    def __init__(self, problem: SelectionProblem) -> None:
        self._costs = problem.cost_matrix
        self._depth = problem.depth_matrix
        self._limits = problem.limits
        self._has_depth = bool(np.any(self._depth > 0))
        self._grid = Grid.of(problem) if problem.clients else None
        cheapest = np.cumsum(np.sort(self._costs, axis=1), axis=1)
        self._most = (cheapest <= self._limits[:, None]).sum(axis=1)

    def best(self, scores: FloatArray, rows: slice) -> BoolArray:
        """Pick for each client in `rows` its best affordable set; `scores` has a row for each.

        Scores of 0 or less are never picked; those of layers that cannot be afforded must be 0.
        """
        clients = np.arange(len(self._limits))[rows]
        chosen = self._highest(scores, self._most[clients])
        # The K highest scores are best where they fit, and mostly they do.
        hard = np.flatnonzero(self._spent(chosen, clients) > self._limits[clients])
        if not len(hard):
            return chosen
        order, useful = self._useful(scores[hard], clients[hard])
        if self._grid is None:
            for row, layers, use in zip(hard, order, useful, strict=True):
                chosen[row] = self._pareto(scores[row], layers[use], clients[row])
            return chosen
        widest = int(useful.sum(axis=1).max())
        cells = int(self._grid.budgets[clients[hard]].max()) + 1
        step = max(1, TABLE_ENTRIES // (widest * cells))
        for first in range(0, len(hard), step):
            part = slice(first, first + step)
            rows_now = hard[part]
            chosen[rows_now] = self._dynamic(
                self._grid, scores[rows_now], clients[rows_now], order[part], useful[part]
            )
        return chosen

    @staticmethod
    def _highest(scores: FloatArray, most: NDArray[np.intp]) -> BoolArray:
        order = np.argsort(-scores, axis=1, kind="stable")
        chosen = np.zeros(scores.shape, dtype=bool)
        np.put_along_axis(chosen, order, np.arange(scores.shape[1]) < most[:, None], axis=1)
        return chosen & (scores > 0)

    def _spent(self, chosen: BoolArray, clients: NDArray[np.intp]) -> FloatArray:
        spent = np.where(chosen, self._costs[clients], 0.0).sum(axis=1)
        depth = self._depth[clients, chosen.argmax(axis=1)]
        return np.asarray(spent + np.where(chosen.any(axis=1), depth, 0.0))

    def _useful(
        self, scores: FloatArray, clients: NDArray[np.intp]
    ) -> tuple[NDArray[np.intp], BoolArray]:
        """Layers in the order to add them, and which of these can matter; shape (rows, L) each.

        A layer is beaten by an earlier one with no smaller score and no larger cost. With depth
        costs the order is from the output down, so the earlier one is also no deeper.
        """
        if self._has_depth:
            order = np.broadcast_to(np.arange(scores.shape[1])[::-1], scores.shape)
        else:
            order = np.argsort(-scores, axis=1, kind="stable")
        ranked = np.take_along_axis(scores, order, axis=1)
        costs = np.take_along_axis(self._costs[clients], order, axis=1)
        beaten = np.zeros(scores.shape, dtype=np.intp)
        for rank in range(1, int(np.flatnonzero(np.any(ranked > 0, axis=0)).max()) + 1):
            better = costs[:, :rank] <= costs[:, rank : rank + 1]
            if self._has_depth:
                better &= ranked[:, :rank] >= ranked[:, rank : rank + 1]
            beaten[:, rank] = better.sum(axis=1)
        return order, (ranked > 0) & (beaten < self._most[clients][:, None])

    def _dynamic(
        self,
        grid: Grid,
        scores: FloatArray,
        clients: NDArray[np.intp],
        order: NDArray[np.intp],
        useful: BoolArray,
    ) -> BoolArray:
        """Fill best totals by budget, layer by layer, then walk back; see the module docstring.

        With depth costs, layers come from the output down: what is best up to a layer, in the
        budget left by that layer's depth cost, is the best whose lowest layer is no deeper.
        """
        n, width = len(clients), int(useful.sum(axis=1).max())
        each = np.arange(n)
        # Useful layers to the front; what fills up the rows is too dear to be taken.
        front = np.argsort(~useful, axis=1, kind="stable")[:, :width]
        layers = np.take_along_axis(order, front, axis=1)
        used = np.take_along_axis(useful, front, axis=1)
        budgets = grid.budgets[clients]
        size = int(budgets.max()) + 1
        gains = np.take_along_axis(scores, layers, axis=1)
        costs = np.where(used, grid.costs[clients[:, None], layers], size)
        depth = np.where(used, grid.depth[clients[:, None], layers], size)
        # Budgets below 0, which nothing fits in, stand to the left.
        table = np.full((n, 2 * size), -np.inf)
        table[:, size:] = 0.0
        totals = table[:, size:]
        places = (each * 2 * size)[:, None] + np.arange(size, 2 * size)
        taken = np.empty((width, n, size), dtype=bool)
        best, last, room = np.zeros(n), np.full(n, width - 1), budgets.copy()
        if self._has_depth:
            last[:] = -1
        for rank in range(width):
            cost = np.minimum(costs[:, rank : rank + 1], size)
            with_layer = table.ravel().take(places - cost)
            with_layer += gains[:, rank : rank + 1]
            np.greater(with_layer, totals, out=taken[rank])
            np.maximum(with_layer, totals, out=totals)
            if self._has_depth:
                left = budgets - depth[:, rank]
                total = np.where(left >= 0, totals[each, np.maximum(left, 0)], 0.0)
                better = total > best
                best[better], last[better], room[better] = total[better], rank, left[better]
        chosen = np.zeros(scores.shape, dtype=bool)
        for rank in range(width - 1, -1, -1):
            take = taken[rank, each, room] & (rank <= last)
            chosen[each[take], layers[take, rank]] = True
            room = room - np.where(take, costs[:, rank], 0)
        return chosen

    def _pareto(self, scores: FloatArray, layers: NDArray[np.intp], client: int) -> BoolArray:
        best = np.zeros(len(scores), dtype=bool)
        best_total = 0.0
        for start in layers if self._has_depth else layers[-1:]:
            room = self._limits[client] - (self._depth[client, start] if self._has_depth else 0.0)
            useful = layers[layers >= start] if self._has_depth else layers
            if room < 0 or scores[useful].sum() <= best_total:
                continue
            picks = _pareto_set(scores[useful], self._costs[client, useful], room)
            total = scores[useful[picks]].sum()
            if total > best_total:
                best[:] = False
                best[useful[picks]] = True
                best_total = total
        return best


def _pareto_set(scores: FloatArray, costs: FloatArray, room: float) -> list[int]:
    """Indices of the best set within `room`; both arrays of shape (items,)."""
    # Good value for money first: the early frontier then already dominates most later pairs.
    order = np.argsort(-scores / np.maximum(costs, 1e-300), kind="stable")
    frontier_cost, frontier_score = np.zeros(1), np.zeros(1)
    history: list[tuple[FloatArray, FloatArray]] = []
    for item in order:
        with_cost = frontier_cost + costs[item]
        fits = with_cost <= room
        cost = np.concatenate([frontier_cost, with_cost[fits]])
        score = np.concatenate([frontier_score, frontier_score[fits] + scores[item]])
        by_cost = np.lexsort((-score, cost))
        cost, score = cost[by_cost], score[by_cost]
        best_before = np.maximum.accumulate(np.concatenate([[-np.inf], score[:-1]]))
        keep = score > best_before
        history.append((frontier_cost, frontier_score))
        frontier_cost, frontier_score = cost[keep], score[keep]
    chosen = []
    cost_at, score_at = frontier_cost[-1], frontier_score[-1]
    for item, (costs_before, scores_before) in zip(order[::-1], history[::-1], strict=True):
        # The pair was there before this item, bit for bit, or this item made it.
        if np.any((costs_before == cost_at) & (scores_before == score_at)):
            continue
        chosen.append(int(item))
        made = (costs_before + costs[item] == cost_at) & (scores_before + scores[item] == score_at)
        source = int(np.flatnonzero(made)[0])
        cost_at, score_at = costs_before[source], scores_before[source]
    return chosen
