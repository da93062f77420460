"""Layer selection, problem (P1): its data, certified solvers, and one entry point, :func:`solve`."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Literal, get_args

from layerfed.selection.knapsack import ClientOracle
from layerfed.selection.lagrangian import solve_lagrangian
from layerfed.selection.milp import require_highs, solve_milp
from layerfed.selection.preparing import (
    charge_switching,
    forgive_richer,
    limit_weights,
    mean_gain,
    round_costs,
)
from layerfed.selection.problem import (
    PROVEN,
    Selection,
    SelectionError,
    SelectionProblem,
    proof_gap,
)
from layerfed.selection.ties import break_ties

__all__ = [
    "Selection",
    "SelectionError",
    "SelectionProblem",
    "Solver",
    "charge_switching",
    "forgive_richer",
    "limit_weights",
    "mean_gain",
    "require_highs",
    "round_costs",
    "solve",
    "solve_lagrangian",
    "solve_milp",
]

logger = logging.getLogger(__name__)

Solver = Literal["auto", "lagrangian", "milp"]

#: Share of the time limit after which ``"auto"`` hands a gap to the integer program.
LAGRANGIAN_SHARE = 0.7
#: Number of picks above which it never does: the program would not finish in a round's time.
MOST_PICKS = 10_000


def solve(
    problem: SelectionProblem,
    *,
    solver: Solver = "auto",
    time_limit: float = 10.0,
    gap: float = 1e-6,
) -> Selection:
    """Return the best masks of one round, with a certificate of how good they are.

    Parameters
    ----------
    problem : SelectionProblem
        One round's instance of (P1).
    solver : {"auto", "lagrangian", "milp"}
        ``"auto"`` runs the Lagrangian solver. If that leaves a gap on up to `MOST_PICKS` picks, it
        runs the integer program as well. ``"lagrangian"`` never uses the integer program, and
        ``"milp"`` always does. At λ = 0 clients do not affect each other, and every choice solves
        their knapsacks exactly.
    time_limit : float
        Seconds, checked between evaluations of a bound; at least one is made. An evaluation takes
        milliseconds, or seconds for hundreds of clients whose costs lie on no grid (`round_costs`).
    gap : float
        Relative gap that is good enough. At 1e-6 or below, the solvers try for a proof.

    Returns
    -------
    Selection
        Masks within all budgets, with their bound. Of equally good masks these are the ones that
        :mod:`layerfed.selection.ties` prefers.

    Raises
    ------
    ValueError
        If an argument is out of range.
    SelectionError
        If the solver is ``"milp"``, and HiGHS is not installed or finds no masks in time.
    """
    _check_arguments(solver, time_limit, gap)
    started = time.perf_counter()
    oracle = ClientOracle(problem)
    if problem.consistency == 0.0 or problem.clients <= 1:
        masks = oracle.best(problem.values)
        found = Selection.certified(problem, masks, problem.objective(masks), "knapsack", 0.0)
    elif solver == "milp":
        found = solve_milp(problem, time_limit=time_limit, gap=proof_gap(gap))
    else:
        found = _solve_by_bound(problem, solver, time_limit, gap, started)
    if found.gap <= PROVEN:
        masks = break_ties(problem, found.masks, oracle)
        found = Selection.certified(problem, masks, found.bound, found.solver, 0.0)
    seconds = time.perf_counter() - started
    if found.gap > max(gap, PROVEN):
        logger.warning(
            "selection stopped with a relative gap of %.2e (asked: %.2e) after %.2f s "
            "(limit: %.2f s) by %s",
            *(found.gap, gap, seconds, time_limit, found.solver),
        )
    return replace(found, seconds=seconds)


def _solve_by_bound(
    problem: SelectionProblem, solver: Solver, time_limit: float, gap: float, started: float
) -> Selection:
    """Solve with the Lagrangian; hand a gap to the integer program if `solver` and size allow it."""
    both = solver == "auto" and problem.values.size <= MOST_PICKS
    share = LAGRANGIAN_SHARE if both else 1.0
    found = solve_lagrangian(problem, time_limit=share * time_limit, gap=gap)
    if not both or found.gap <= gap:
        return found
    left = max(started + time_limit - time.perf_counter(), 0.01)
    try:
        closed = solve_milp(problem, time_limit=left, gap=gap)
    except SelectionError as error:
        logger.warning("the integer program could not close the gap: %s", error)
        return found
    best = max(found, closed, key=lambda selection: selection.objective)
    bound, name = min(closed.bound, found.bound), f"{found.solver}+{closed.solver}"
    return Selection.certified(problem, best.masks, bound, name, 0.0)


def _check_arguments(solver: str, time_limit: float, gap: float) -> None:
    if solver not in get_args(Solver):
        raise ValueError(f"solver is {solver!r}; expected one of {list(get_args(Solver))}")
    if not time_limit > 0:
        raise ValueError(f"time_limit is {time_limit}; expected seconds above 0")
    if not 0 <= gap < 1:
        raise ValueError(f"gap is {gap}; expected a relative gap in [0, 1)")
