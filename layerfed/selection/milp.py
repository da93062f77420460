"""(P1) as an integer program, written with PuLP in the count form and solved by HiGHS.

The pairwise form of [S] needs a variable for every pair of clients and every layer. Here the penalty
is a function f of the count ``k_l`` (see :class:`SelectionProblem`), written in unary:

- ``k_l = sum_j u_lj`` with ``1 >= u_l1 >= u_l2 >= ... >= u_ln >= 0``, and
  ``f(k_l) = f(0) + sum_j (f(j) - f(j-1)) u_lj``.
- λ < 0 makes f concave. Its increments fall, so the steps ``u`` fill in order by themselves and can
  be continuous.
- λ > 0 makes f convex. A solver would take the late, large increments first, so the steps are binary
  and their order is a constraint.

The form is exact for both signs. ``y_is`` codes the lowest selected layer ("client i may go down to
layer s"). Each client has at most one, with ``m_il <= sum_{s<=l} y_is`` and the price ``D_is``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pulp

from layerfed.selection.problem import BoolArray, Selection, SelectionError, SelectionProblem

#: Largest share of the time limit for building the model. Handing it to HiGHS and reading the answer
#: take as long again, and a larger model would not be solved in the rest.
BUILD_SHARE = 0.15

#: The objective is scaled so that its largest coefficient is this. Solvers' tolerances are absolute,
#: and squared gradient norms can have any magnitude.
OBJECTIVE_SCALE = 100.0

#: Tolerance on rows, bounds and integrality; rows are scaled to a right-hand side of about 1.
#: Below 1e-7 HiGHS 1.15's presolve has declared wrong solutions optimal.
FEASIBILITY = 1e-7

#: HiGHS's status of a solution that satisfies all rows (`SolutionStatus::kSolutionStatusFeasible`).
FEASIBLE = 2


def solve_milp(
    problem: SelectionProblem, *, time_limit: float = 10.0, gap: float = 1e-6
) -> Selection:
    """Solve (P1) exactly with PuLP and HiGHS.

    Parameters
    ----------
    problem : SelectionProblem
        The instance.
    time_limit : float
        Seconds; building the model may take `BUILD_SHARE` of them.
    gap : float
        Relative gap at which the solver may stop.

    Returns
    -------
    Selection
        Masks with the bound of HiGHS, which is infinite if HiGHS states none.

    Raises
    ------
    SelectionError
        If HiGHS is missing or failed, the program is too large to be built in time, or no masks were
        found.
    """
    require_highs()
    started = time.perf_counter()
    model = _Model(problem.saturated(), started + BUILD_SHARE * time_limit)
    bound = 0.0
    if model.picks:
        # Handing the model over takes about as long as building it.
        built = time.perf_counter() - started
        found, bound = _run(model, max(time_limit - 2 * built, 0.01), gap)
        if not found:
            raise SelectionError(
                f"no masks for {problem.clients} clients x {problem.layers} layers from HiGHS in "
                f"{time_limit} s: raise the time limit or use the solver 'auto'"
            )
    masks = _within_budgets(problem, model.masks())
    seconds = time.perf_counter() - started
    return Selection.certified(problem, masks, bound, "milp-highs", seconds)


def require_highs() -> None:
    """Raise SelectionError if HiGHS is not installed."""
    if not pulp.HiGHS(msg=False).available():
        raise SelectionError("HiGHS is not installed: `pip install highspy`")


def _run(model: _Model, time_limit: float, gap: float) -> tuple[bool, float]:
    """Solve `model` in place; return whether it has a solution, and an upper bound on (P1)."""
    solver = pulp.HiGHS(
        msg=False,
        threads=1,
        timeLimit=time_limit,
        gapRel=gap,
        gapAbs=0.0,
        mip_feasibility_tolerance=FEASIBILITY,
        primal_feasibility_tolerance=FEASIBILITY,
    )
    with _nothing_on_stdout():
        model.program.solve(solver)
    highs = model.program.solverModel
    status, info = highs.getModelStatus().name, highs.getInfo()
    if "Infeasible" in status or "Unbounded" in status or "Error" in status:
        raise SelectionError(
            f"HiGHS ends with {status}, which is wrong: selecting nothing is always possible; "
            "check the magnitudes of values and costs"
        )
    return info.primal_solution_status == FEASIBLE, model.unscaled(float(info.mip_dual_bound))


@contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """Redirect a C library's standard output to standard error.

    HiGHS 1.16 prints a banner when it starts, before it can be told not to, and not through
    `sys.stdout`. Another program may read the standard output.
    """
    try:
        kept = os.dup(1)
    except OSError:  # it is closed
        yield
        return
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _within_budgets(problem: SelectionProblem, masks: BoolArray) -> BoolArray:
    """Drop picks until budgets hold exactly, since the solver has its own tolerance."""
    masks = masks.copy()
    for client in np.flatnonzero(problem.spent(masks) > problem.limits):
        for layer in np.argsort(problem.values[client]):
            masks[client, layer] = False
            if problem.spent(masks)[client] <= problem.limits[client]:
                break
    return masks


def weighted_sum(terms: Iterable[tuple[Any, float]]) -> Any:
    """Return a weighted sum of variables, in a way that PuLP 3 and 4 both support."""
    total = pulp.lpSum([])
    for variable, factor in terms:
        total.addterm(variable, float(factor))
    return total


class _Model:
    """The PuLP model of one problem: it minimises the negated, scaled objective.

    Raises SelectionError if it is not built by `deadline` (``time.perf_counter()``).
    """

    def __init__(self, problem: SelectionProblem, deadline: float) -> None:
        self._deadline = deadline
        self._problem = problem
        largest = max(np.abs(problem.values).max(initial=0.0), abs(problem.consistency))
        self._scale = OBJECTIVE_SCALE / largest if largest > 0 else 1.0
        self.program = pulp.LpProblem("layer_selection", pulp.LpMinimize)
        self.picks: dict[tuple[int, int], Any] = {}
        for client, layer in np.argwhere(problem.affordable).tolist():
            pick = self.program.add_variable(f"m_{client}_{layer}", cat="Binary")
            self.picks[client, layer] = pick
        self._cost = [(pick, -problem.values[place]) for place, pick in self.picks.items()]
        for client in np.flatnonzero(problem.affordable.any(axis=1)).tolist():
            self._check_time()
            self._add_budget(client)
        if problem.consistency and problem.clients > 1:
            for layer in np.flatnonzero(problem.affordable.any(axis=0)).tolist():
                self._check_time()
                self._add_penalty(layer)
        self.program.setObjective(
            weighted_sum((term, self._scale * cost) for term, cost in self._cost)
        )

    def masks(self) -> BoolArray:
        """Return the masks of the solver's current solution, shape (n, L)."""
        masks = np.zeros(self._problem.values.shape, dtype=bool)
        for place, pick in self.picks.items():
            masks[place] = pick.varValue is not None and pick.varValue > 0.5
        return masks

    def unscaled(self, objective: float) -> float:
        """Return the objective of (P1) for one of the program."""
        return -objective / self._scale

    def _check_time(self) -> None:
        if time.perf_counter() > self._deadline:
            problem = self._problem
            raise SelectionError(
                f"the integer program of {problem.clients} clients x {problem.layers} layers is too "
                "large to build in time: raise the time limit, or use the solver 'lagrangian'"
            )

    def _add_budget(self, client: int) -> None:
        problem = self._problem
        limit = float(problem.limits[client])
        # Dividing by the budget makes the row's tolerance relative. With a budget of 0 only layers
        # without cost are left.
        unit = limit if limit > 0 else 1.0
        costs = problem.cost_matrix[client] / unit
        able = np.flatnonzero(problem.affordable[client]).tolist()
        picks = {at: self.picks[client, at] for at in able}
        terms = [(pick, costs[at]) for at, pick in picks.items()]
        if problem.depth_costs is not None:
            names = [f"y_{client}_{layer}" for layer in range(problem.layers)]
            low = [self.program.add_variable(name, cat="Binary") for name in names]
            self.program += pulp.lpSum(low) <= 1
            for layer, pick in picks.items():
                self.program += pick <= pulp.lpSum(low[: layer + 1])
            # Twice the budget forbids a layer like any larger number does, and scales better.
            prices = np.minimum(problem.depth_matrix[client] / unit, 2.0)
            terms += zip(low, prices, strict=True)
        self.program += weighted_sum(terms) <= limit / unit

    def _add_penalty(self, layer: int) -> None:
        problem = self._problem
        able = np.flatnonzero(problem.affordable[:, layer]).tolist()
        picks = [self.picks[client, layer] for client in able]
        kind = "Binary" if problem.consistency > 0 else "Continuous"
        steps = [
            self.program.add_variable(f"u_{layer}_{j}", 0, 1, cat=kind) for j in range(len(picks))
        ]
        for earlier, later in pairwise(steps):
            self.program += later <= earlier
        self.program += pulp.lpSum(steps) == pulp.lpSum(picks)
        self._cost += zip(steps, -np.diff(problem.penalties), strict=False)
