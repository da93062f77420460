"""Feasible masks for (P1): repair of what the relaxation proposes, and local search.

Every move asks the client oracle for an exact best response, so dropping a layer, adding one
and swapping any number of them within a client are all one move.
"""

from __future__ import annotations

import time

import numpy as np

from layerfed.selection.oracle import ClientOracle
from layerfed.selection.problem import BoolArray, FloatArray, SelectionProblem

#: Rounds of joint best responses from one start; they settle after two or three.
SETTLING_ROUNDS = 12


class PrimalSearch:
    """Keeps the best feasible masks seen for one problem.

    Parameters
    ----------
    problem : SelectionProblem
        The instance.
    oracle : ClientOracle
        Best responses under the instance's budgets.
    deadline : float
        ``time.perf_counter()`` value after which no new move is begun.

    Attributes
    ----------
    masks : array of bool, shape (n, L)
        The incumbent; selecting nothing to begin with.
    objective : float
        Its objective.
    """

    def __init__(
        self, problem: SelectionProblem, oracle: ClientOracle, deadline: float = np.inf
    ) -> None:
        self._problem = problem
        self._oracle = oracle
        self.deadline = deadline
        self.masks = np.zeros(problem.values.shape, dtype=bool)
        self.objective = problem.objective(self.masks)

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return time.perf_counter() > self.deadline

    def offer(self, masks: BoolArray) -> float:
        """Make feasible `masks` the incumbent if they are better; returns their objective."""
        objective = self._problem.objective(masks)
        if objective > self.objective:
            self.masks, self.objective = masks, objective
        return objective

    def settle(self, counts: FloatArray) -> BoolArray:
        """Let all clients respond at once to `counts` (shape (L,)) until nothing improves.

        With λ >= 0 the penalty f(k) = -λ k (n - k) is convex, so it lies above its tangent at
        the current counts. Maximising the tangent problem, in which every client is alone with
        its scores ``v + f'(k)``, therefore never lowers the objective (the convex-concave
        procedure). It also repairs: `counts` need not come from feasible masks. With λ < 0
        there is no such guarantee, so the clients then respond one after the other.
        """
        problem = self._problem
        masks = self._oracle.best(problem.values + self.slopes(counts))
        reached = self.offer(masks)
        if problem.consistency < 0:
            return self._respond_in_turn(masks, self.deadline)
        for _ in range(SETTLING_ROUNDS):
            if self.late:
                break
            following = self._oracle.best(problem.values + self.slopes(masks.sum(axis=0)))
            objective = self.offer(following)
            if objective <= reached:
                break
            masks, reached = following, objective
        return masks

    def slopes(self, counts: FloatArray) -> FloatArray:
        """Slope of the penalty at `counts`, shape (L,): λ (2 k - n)."""
        slopes = self._problem.consistency * (2.0 * counts - self._problem.clients)
        return np.asarray(slopes)

    def intensify(self, deadline: float, target: float) -> None:
        """Local search from the incumbent until `deadline` or an objective of `target`.

        Clients respond in turn. With λ > 0 the good masks are also far apart: a layer pays only
        once most clients take it. So layers are pushed to all or to no client, alone and in
        pairs, and the clients settle from there.
        """
        before = -np.inf
        deadline = min(deadline, self.deadline)
        while self.objective > before and self.objective < target:
            before = self.objective
            self._respond_in_turn(self.masks, deadline)
            if self._problem.consistency > 0:
                self._kick(deadline, target)

    def _respond_in_turn(self, masks: BoolArray, deadline: float) -> BoolArray:
        """Exact best response of one client after the other, given all others' masks."""
        problem, lam = self._problem, self._problem.consistency
        masks = masks.copy()
        counts = masks.sum(axis=0).astype(np.float64)
        for client in range(problem.clients):
            if time.perf_counter() > deadline:
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

    def _kick(self, deadline: float, target: float) -> None:
        problem = self._problem
        start = self.masks.sum(axis=0).astype(np.float64)
        used = np.flatnonzero(start > 0)
        everyone, nobody = float(problem.clients), 0.0
        kicks: list[list[tuple[int, float]]] = [[(int(a), nobody)] for a in used]
        rest = np.argsort(-problem.values.sum(axis=0), kind="stable")
        kicks += [[(int(b), everyone)] for b in rest]
        kicks += [[(int(a), nobody), (int(b), everyone)] for b in rest for a in used if a != b]
        for kick in kicks:
            if time.perf_counter() > deadline or self.objective >= target:
                return
            counts = start.copy()
            for layer, count in kick:
                counts[layer] = count
            self.settle(counts)
