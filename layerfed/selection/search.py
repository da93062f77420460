"""Feasible masks for (P1), found by repairing the masks of the relaxation.

Every move asks the client oracle for an exact best response. One move can therefore drop, add and swap
any number of a client's layers.
"""

from __future__ import annotations

import time

import numpy as np

from layerfed.selection.knapsack import ClientOracle
from layerfed.selection.problem import BoolArray, FloatArray, SelectionProblem

#: Most joint best responses from one start. More would improve the masks. But if each one needs a
#: knapsack and not only a sort, they take the time of steps of the bound.
SORTED_ROUNDS = 12
KNAPSACK_ROUNDS = 3


class PrimalSearch:
    """Keeps the best feasible masks (n, L) found for one problem; the first ones select nothing.

    No move begins after `deadline`, a value of ``time.perf_counter()``.
    """

    def __init__(
        self, problem: SelectionProblem, oracle: ClientOracle, deadline: float = np.inf
    ) -> None:
        self._problem = problem
        self._oracle = oracle
        self.deadline = deadline
        self._rounds = KNAPSACK_ROUNDS if oracle.room is None else SORTED_ROUNDS
        self.masks = np.zeros(problem.values.shape, dtype=bool)
        self.objective = problem.objective(self.masks)

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return time.perf_counter() > self.deadline

    def offer(self, masks: BoolArray) -> float:
        """Make feasible `masks` the incumbent if they are better; return their objective."""
        objective = self._problem.objective(masks)
        if objective > self.objective:
            self.masks, self.objective = masks, objective
        return objective

    def settle(self, counts: FloatArray) -> BoolArray:
        """Let all clients respond at once to `counts` (shape (L,)) until nothing improves.

        With λ >= 0 the penalty f(k) = -λ k (n - k) is convex, so it lies above its tangent at the
        current counts. In the tangent problem clients are independent, with scores ``v + f'(k)``.
        Maximising it never lowers the objective (the convex-concave procedure). It also repairs masks:
        `counts` need not come from feasible ones. With λ < 0 nothing guarantees this, so the clients
        respond one after the other.
        """
        problem = self._problem
        masks = self._oracle.best(problem.values + self.slopes(counts))
        reached = self.offer(masks)
        if problem.consistency < 0:
            return self._respond_in_turn(masks)
        for _ in range(self._rounds):
            if self.late:
                break
            following = self._oracle.best(problem.values + self.slopes(masks.sum(axis=0)))
            objective = self.offer(following)
            if objective <= reached:
                break
            masks, reached = following, objective
        return masks

    def slopes(self, counts: FloatArray) -> FloatArray:
        """Return the slope of the penalty at `counts`, shape (L,): λ (2 k - n)."""
        slopes = self._problem.consistency * (2.0 * counts - self._problem.clients)
        return np.asarray(slopes)

    def _respond_in_turn(self, masks: BoolArray) -> BoolArray:
        """Give each client in turn its exact best response to all other clients' masks."""
        problem, lam = self._problem, self._problem.consistency
        masks = masks.copy()
        counts = masks.sum(axis=0).astype(np.float64)
        for client in range(problem.clients):
            if self.late:
                break
            others = counts - masks[client]
            # f(k+1) - f(k) with the other clients' count k.
            marginal = lam * (2.0 * others + 1.0 - problem.clients)
            scores = problem.values[client] + marginal
            row = self._oracle.best(scores[None, :], slice(client, client + 1))[0]
            if scores[row].sum() > scores[masks[client]].sum():
                masks[client] = row
                counts = others + row
        self.offer(masks)
        return masks
