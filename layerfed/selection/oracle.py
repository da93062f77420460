"""A client's exact best response: the affordable set of layers with the largest total score.

This is a knapsack per client. Exact methods share the work, by what the costs allow:

- equal costs: take the best layers that fit (a sort);
- few layers: score every set of layers at once (a matrix product);
- anything else: :mod:`layerfed.selection.knapsack`.

Depth costs are handled by trying each layer ``s`` as the lowest allowed one, at the price
``D[s]``. A set whose true lowest layer lies above ``s`` is charged too much by that, never too
little, because ``D`` does not increase with the layer index; its own ``s`` charges it exactly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from layerfed.selection.knapsack import Knapsacks
from layerfed.selection.problem import BoolArray, FloatArray, SelectionProblem

#: Up to this many layers all 2^L sets are scored at once; 4,096 sets cost less than one sort.
ENUMERATION_LAYERS = 12


class ClientOracle:
    """Best responses of all clients of one problem, for scores that change between calls.

    Parameters
    ----------
    problem : SelectionProblem
        Supplies costs, depth costs and budgets; its values and λ are not used.
    """

    def __init__(self, problem: SelectionProblem) -> None:
        self._affordable = problem.affordable
        self._costs = problem.cost_matrix
        self._depth = problem.depth_matrix
        self._limits = problem.limits
        self.has_depth = bool(np.any(problem.depth_matrix > 0))
        self._uniform = bool(np.all(self._costs == self._costs[:, :1]))
        self._room = self._room_for_layers() if self._uniform else None
        self._sets: BoolArray | None = None
        self._knapsacks: Knapsacks | None = None
        if self._uniform:
            return
        if problem.layers <= ENUMERATION_LAYERS:
            self._enumerate(problem)
        else:
            self._knapsacks = Knapsacks(problem)

    @property
    def integral(self) -> bool:
        """Whether pricing the budgets leaves no knapsack gap: equal costs, no depth costs."""
        return self._uniform and not self.has_depth

    @property
    def room(self) -> FloatArray | None:
        """With equal costs: how many layers each client can take, shape (n,); else None."""
        return None if self._room is None else self._room[:, 0]

    def best(self, scores: FloatArray, clients: slice | None = None) -> BoolArray:
        """Pick for each client the feasible set with the largest total score.

        Parameters
        ----------
        scores : array of shape (n, L)
            Layers with a score of 0 or less are never picked.
        clients : slice, optional
            Restrict to these clients; `scores` then has one row for each of them.

        Returns
        -------
        array of bool, shape of `scores`
        """
        rows = clients if clients is not None else slice(None)
        scores = np.where(self._affordable[rows], scores, 0.0)
        if self._sets is not None:
            return self._best_enumerated(scores, rows)
        if self._room is not None:
            return self._best_uniform(scores, self._room[rows])
        assert self._knapsacks is not None
        return self._knapsacks.best(scores, rows)

    def _room_for_layers(self) -> FloatArray:
        """How many layers fit when the lowest allowed one is ``s``, shape (n, L)."""
        left = self._limits[:, None] - self._depth
        cost = self._costs
        with np.errstate(divide="ignore", invalid="ignore"):
            room = np.where(cost > 0, np.floor(left / cost), np.inf)
        return np.clip(np.where(left >= 0, room, 0), 0, cost.shape[1])

    def _best_uniform(self, scores: FloatArray, room: FloatArray) -> BoolArray:
        if not self.has_depth:
            return _top(scores, room[:, 0])
        best = np.zeros(scores.shape, dtype=bool)
        best_total = np.zeros(len(scores))
        for start in range(scores.shape[1]):
            chosen = _top(scores[:, start:], room[:, start])
            total = np.where(chosen, scores[:, start:], 0.0).sum(axis=1)
            better = total > best_total
            best[better] = False
            best[better, start:] = chosen[better]
            best_total[better] = total[better]
        return best

    def _enumerate(self, problem: SelectionProblem) -> None:
        layers = problem.layers
        self._sets = (np.arange(2**layers)[:, None] >> np.arange(layers) & 1).astype(bool)
        weights = self._sets.astype(np.float64)
        self._weights = weights.T
        lowest = self._sets.argmax(axis=1)
        costs = (
            self._costs @ weights.T
            + np.where(self._sets.any(axis=1), 1, 0) * (self._depth[:, lowest])
        )
        self._excluded = np.where(costs <= self._limits[:, None], 0.0, -np.inf)

    def _best_enumerated(self, scores: FloatArray, rows: slice) -> BoolArray:
        assert self._sets is not None
        winner = (scores @ self._weights + self._excluded[rows]).argmax(axis=1)
        return np.asarray(self._sets[winner] & (scores > 0))


def largest(entries: FloatArray, ranked: FloatArray, counts: NDArray[np.intp]) -> BoolArray:
    """Mark in each row of `entries` its `counts` largest; equal ones count from the left.

    `ranked` holds the rows sorted to fall. Comparing with the last value taken spares the
    positions, which cost several times as much to sort as the values; only rows in which that
    value is tied need them.
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


def _top(scores: FloatArray, room: FloatArray) -> BoolArray:
    """Per row, the `room` largest positive scores."""
    counts = np.minimum(room, scores.shape[1]).astype(np.intp)
    return largest(scores, -np.sort(-scores, axis=1), counts) & (scores > 0)
