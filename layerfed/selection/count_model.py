"""(P1) as an integer program: the count form, written with PuLP.

The pairwise form of [S] needs a variable for every pair of clients and layer. Here the penalty
is a function f of the count ``k_l`` (see :class:`SelectionProblem`), written in unary:

- ``k_l = sum_j u_lj`` with ``1 >= u_l1 >= u_l2 >= ... >= u_ln >= 0``, and
  ``f(k_l) = f(0) + sum_j (f(j) - f(j-1)) u_lj``.
- λ < 0 makes f concave: its increments fall, so the steps fill in order by themselves and stay
  continuous. λ > 0 makes f convex: a solver would take the late, large increments first, so
  the steps are binary and the order is enforced. The form is exact for both signs.
- With λ > 0 the linear relaxation of the unary steps forgets the penalty. f of a set's size is
  then supermodular, so every order π of the clients gives the valid inequality
  ``f(k_l) <= f(0) + sum_i (f(π(i)) - f(π(i) - 1)) m_il`` (Edmonds' greedy theorem on the Lovász
  extension). The order by reduced gain at good budget prices makes the relaxation as tight as
  the Lagrangian bound; that is what :class:`Reduction` carries over.

The lowest selected layer is coded by ``y_is`` ("client i may go down to layer s"), at most one
per client: ``m_il <= sum_{s<=l} y_is``, priced ``D_is``.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import numpy as np
import pulp
from numpy.typing import NDArray

from layerfed.selection.problem import BoolArray, SelectionError, SelectionProblem
from layerfed.selection.reduction import Reduction

#: The largest objective coefficient is scaled to this. Solvers' tolerances are absolute, and
#: squared gradient norms come in any magnitude.
OBJECTIVE_SCALE = 100.0

#: Slack on the scaled objective where it is held at its optimum: above the solvers' tolerance.
OBJECTIVE_SLACK = 1e-5


class CountModel:
    """The PuLP model of one problem, as a minimisation of the negated, scaled objective.

    Parameters
    ----------
    problem : SelectionProblem
        The instance.
    reduction : Reduction
        Variables fixed, and orders for the cuts.
    deadline : float
        ``time.perf_counter()`` value at which the model must have been written down.

    Raises
    ------
    SelectionError
        If the model is too large for that.
    """

    def __init__(
        self, problem: SelectionProblem, reduction: Reduction, deadline: float = np.inf
    ) -> None:
        problem = problem.saturated()
        self._deadline = deadline
        self._problem = problem
        largest = max(np.abs(problem.values).max(initial=0.0), abs(problem.consistency))
        self._scale = OBJECTIVE_SCALE / largest if largest > 0 else 1.0
        self._objective: list[tuple[Any, float]] = []
        self._steps: dict[int, list[Any]] = {}
        self._low: dict[int, list[Any]] = {}
        self.constant = 0.0
        self.program = pulp.LpProblem("layer_selection", pulp.LpMinimize)
        self._force = reduction.force
        free = reduction.allow & ~reduction.force
        self._picks: dict[tuple[int, int], Any] = {}
        for client in range(problem.clients):
            self._check_time()
            for j in np.flatnonzero(free[client]):
                pick = self.program.add_variable(f"m_{client}_{j}", cat="Binary")
                self._picks[client, int(j)] = pick
        self.empty = not self._picks
        self._add_gains()
        for i in np.flatnonzero(free.any(axis=1)):
            self._check_time()
            self._add_budget(int(i))
        if problem.consistency and problem.clients > 1:
            for layer in range(problem.layers):
                self._check_time()
                self._add_penalty(layer, [order[layer] for order in reduction.orders])
        self.program += pulp.LpAffineExpression(self._objective)

    def masks(self) -> BoolArray:
        """Masks of the solver's current solution, shape (n, L)."""
        masks = self._force.copy()
        for place, pick in self._picks.items():
            masks[place] = pick.varValue is not None and pick.varValue > 0.5
        return masks

    def unscaled(self, objective: float) -> float:
        """Turn the program's minimised objective into (P1)'s."""
        return self.constant - objective / self._scale

    def start_from(self, masks: BoolArray) -> None:
        """Set every variable to what `masks` implies, as the solver's first solution."""
        for place, pick in self._picks.items():
            pick.setInitialValue(int(masks[place]))
        counts = masks.sum(axis=0)
        for layer, steps in self._steps.items():
            forced = int(self._force[:, layer].sum())
            for j, step in enumerate(steps, start=forced + 1):
                step.setInitialValue(int(counts[layer] >= j))
        for client, low in self._low.items():
            lowest = int(masks[client].argmax()) if masks[client].any() else -1
            for layer, marker in enumerate(low):
                marker.setInitialValue(int(layer == lowest))

    def picks(self, places: NDArray[np.intp]) -> list[Any]:
        """Variables of the undecided picks at `places` (client, layer), shape (picks, 2)."""
        return [self._picks[int(client), int(layer)] for client, layer in places]

    def keep_objective(self, masks: BoolArray) -> None:
        """Admit only selections as good as `masks`."""
        best = (self.constant - self._problem.objective(masks)) * self._scale
        self.program += pulp.LpAffineExpression(self._objective) <= best + OBJECTIVE_SLACK

    def minimise(self, terms: list[tuple[Any, float]]) -> None:
        """Replace the program's objective."""
        self.program.setObjective(pulp.LpAffineExpression(terms))

    def fix_count(self, picks: list[Any], total: int) -> None:
        """Admit only masks with `total` picks, of which `picks` are the undecided ones."""
        self.program += pulp.lpSum(picks) == total - int(self._force.sum())

    def fix(self, picks: list[Any]) -> None:
        """Hold `picks` at their current values."""
        for pick in picks:
            value = round(pick.varValue or 0.0)
            pick.bounds(value, value)

    def _check_time(self) -> None:
        if time.perf_counter() > self._deadline:
            problem = self._problem
            raise SelectionError(
                f"the integer program of {problem.clients} clients x {problem.layers} layers is too "
                "large to write down in time: raise the time limit, or use the solver 'lagrangian'"
            )

    def _add_gains(self) -> None:
        values = self._problem.values
        self.constant += float(values[self._force].sum())
        for place, pick in self._picks.items():
            self._objective.append((pick, -float(values[place]) * self._scale))

    def _add_budget(self, client: int) -> None:
        problem = self._problem
        limit = float(problem.limits[client])
        # Dividing by the budget makes the row's tolerance relative. A budget of 0 leaves only
        # layers that cost nothing, and those need no row.
        unit = limit if limit > 0 else 1.0
        costs = problem.cost_matrix[client]
        terms: list[tuple[Any, float]] = []
        room = limit
        for layer in range(problem.layers):
            if self._force[client, layer]:
                room -= float(costs[layer])
            elif (client, layer) in self._picks:
                terms.append((self._picks[client, layer], float(costs[layer]) / unit))
        if problem.depth_costs is not None:
            terms += self._add_depth(client, unit)
        self.program += pulp.LpAffineExpression(terms) <= max(room, 0.0) / unit

    def _add_depth(self, client: int, unit: float) -> list[tuple[Any, float]]:
        depth = self._problem.depth_matrix[client]
        low = [
            self.program.add_variable(f"y_{client}_{layer}", cat="Binary")
            for layer in range(len(depth))
        ]
        self._low[client] = low
        self.program += pulp.lpSum(low) <= 1
        for layer in range(len(depth)):
            reached = pulp.lpSum(low[: layer + 1])
            if self._force[client, layer]:
                self.program += reached >= 1
            elif (client, layer) in self._picks:
                self.program += self._picks[client, layer] <= reached
        # Twice the budget forbids a layer as well as any larger number, and scales better.
        prices = np.minimum(depth / unit, 2.0)
        return [(marker, float(price)) for marker, price in zip(low, prices, strict=True)]

    def _add_penalty(self, layer: int, orders: list[NDArray[np.intp]]) -> None:
        problem = self._problem
        forced = int(self._force[:, layer].sum())
        picks = {i: pick for (i, at), pick in self._picks.items() if at == layer}
        increments = np.diff(problem.penalties)
        self.constant += float(problem.penalties[forced])
        if not picks:
            return
        kind = "Binary" if problem.consistency > 0 else "Continuous"
        last = forced + len(picks)
        steps = [
            self.program.add_variable(f"u_{layer}_{j}", 0, 1, cat=kind) for j in range(forced, last)
        ]
        self._steps[layer] = steps
        for earlier, later in pairwise(steps):
            self.program += later <= earlier
        self.program += pulp.lpSum(steps) == pulp.lpSum(picks.values())
        scaled = increments * self._scale
        self._objective += [(step, -float(scaled[j])) for j, step in enumerate(steps, start=forced)]
        if problem.consistency < 0:
            return
        reward = [(step, float(increments[j])) for j, step in enumerate(steps, start=forced)]
        largest = float(np.abs(increments).max())
        for order in orders:
            # Forced clients come first in any order, so the rest start at rank `forced`.
            ranked = [picks[int(i)] for i in order if int(i) in picks]
            cut = reward + [(pick, -float(increments[forced + r])) for r, pick in enumerate(ranked)]
            self.program += (
                pulp.LpAffineExpression([(variable, factor / largest) for variable, factor in cut])
                <= 0
            )
