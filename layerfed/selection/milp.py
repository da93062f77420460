"""(P1) as an integer program: written with PuLP in the count form, solved by HiGHS.

The pairwise form of [S] needs a variable for every pair of clients and layer. Here the penalty
is a function f of the count ``k_l`` (see :class:`SelectionProblem`), written in unary:

- ``k_l = sum_j u_lj`` with ``1 >= u_l1 >= u_l2 >= ... >= u_ln >= 0``, and
  ``f(k_l) = f(0) + sum_j (f(j) - f(j-1)) u_lj``.
- λ < 0 makes f concave: its increments fall, so the steps fill in order by themselves and stay
  continuous. λ > 0 makes f convex: a solver would take the late, large increments first, so
  the steps are binary and the order is enforced. The form is exact for both signs.

The lowest selected layer is coded by ``y_is`` ("client i may go down to layer s"), at most one
per client: ``m_il <= sum_{s<=l} y_is``, priced ``D_is``.
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

#: Share of the time limit that writing the model down may take. Handing it over and reading the
#: answer take as long again, and a model this large has no chance in what is left.
BUILD_SHARE = 0.15

#: The largest objective coefficient is scaled to this. Solvers' tolerances are absolute, and
#: squared gradient norms come in any magnitude.
OBJECTIVE_SCALE = 100.0

#: Tolerance on rows, bounds and integrality; rows are scaled to a right-hand side of about 1.
#: Below 1e-7 HiGHS 1.15's presolve has declared wrong solutions optimal.
FEASIBILITY = 1e-7

#: What HiGHS calls a solution that keeps to all rows (`SolutionStatus::kSolutionStatusFeasible`).
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
        Seconds, of which writing the model down may take `BUILD_SHARE`.
    gap : float
        Relative gap at which the solver may stop.

    Returns
    -------
    Selection
        With the bound of HiGHS; infinite where it states none.

    Raises
    ------
    SelectionError
        If HiGHS is missing or failed, the program is too large to be written down in time, or no
        masks were found.
    """
    started = time.perf_counter()
    model = _Model(problem.saturated(), started + BUILD_SHARE * time_limit)
    bound = 0.0
    if model.picks:
        # Handing the model over takes about as long as writing it down.
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


def _run(model: _Model, time_limit: float, gap: float) -> tuple[bool, float]:
    """Solve `model` in place: whether its variables carry masks, and an upper bound on (P1)."""
    solver = pulp.HiGHS(
        msg=False,
        threads=1,
        timeLimit=time_limit,
        gapRel=gap,
        gapAbs=0.0,
        mip_feasibility_tolerance=FEASIBILITY,
        primal_feasibility_tolerance=FEASIBILITY,
    )
    if not solver.available():
        raise SelectionError("HiGHS is not installed: `pip install highspy`")
    with _nothing_on_stdout():
        model.program.solve(solver)
    highs = model.program.solverModel
    status, info = highs.getModelStatus().name, highs.getInfo()
    if "Infeasible" in status or "Unbounded" in status or "Error" in status:
        raise SelectionError(
            f"HiGHS ends with {status}, which cannot be: selecting nothing is always possible; "
            "check the magnitudes of values and costs"
        )
    return info.primal_solution_status == FEASIBLE, model.unscaled(float(info.mip_dual_bound))


@contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """Send to standard error what a library in C writes to standard output.

    HiGHS 1.16 prints a banner as it starts, before it can be told not to, and past `sys.stdout`.
    Standard output may be what a program reads.
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
    """Drop picks until budgets hold exactly: the solver works to a tolerance of its own."""
    masks = masks.copy()
    for client in np.flatnonzero(problem.spent(masks) > problem.limits):
        for layer in np.argsort(problem.values[client]):
            masks[client, layer] = False
            if problem.spent(masks)[client] <= problem.limits[client]:
                break
    return masks


def weighted_sum(terms: Iterable[tuple[Any, float]]) -> Any:
    """Weighted sum of variables: the constructors of PuLP 3 and 4 have nothing in common."""
    total = pulp.lpSum([])
    for variable, factor in terms:
        total.addterm(variable, float(factor))
    return total


class _Model:
    """The PuLP model of one problem, as a minimisation of the negated, scaled objective.

    Raises SelectionError if it is not written down by `deadline` (``time.perf_counter()``).
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
        """Masks of the solver's current solution, shape (n, L)."""
        masks = np.zeros(self._problem.values.shape, dtype=bool)
        for place, pick in self.picks.items():
            masks[place] = pick.varValue is not None and pick.varValue > 0.5
        return masks

    def unscaled(self, objective: float) -> float:
        """Turn the program's minimised objective into (P1)'s."""
        return -objective / self._scale

    def _check_time(self) -> None:
        if time.perf_counter() > self._deadline:
            problem = self._problem
            raise SelectionError(
                f"the integer program of {problem.clients} clients x {problem.layers} layers is too "
                "large to write down in time: raise the time limit, or use the solver 'lagrangian'"
            )

    def _add_budget(self, client: int) -> None:
        problem = self._problem
        limit = float(problem.limits[client])
        # Dividing by the budget makes the row's tolerance relative. A budget of 0 leaves only
        # layers that cost nothing.
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
            # Twice the budget forbids a layer as well as any larger number, and scales better.
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
