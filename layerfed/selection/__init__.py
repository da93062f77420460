"""Layer selection, problem (P1): data, certified solvers, and one way in, :func:`solve`."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from layerfed.selection.canonical import canonicalise
from layerfed.selection.lagrangian import certify, solve_lagrangian
from layerfed.selection.milp import solve_milp
from layerfed.selection.oracle import ClientOracle
from layerfed.selection.problem import PROVEN, Selection, SelectionError, SelectionProblem
from layerfed.selection.reduction import Reduction
from layerfed.selection.rounding import round_costs
from layerfed.selection.scale import limit_weights, scale_consistency

__all__ = [
    "Selection",
    "SelectionError",
    "SelectionProblem",
    "Solver",
    "limit_weights",
    "round_costs",
    "scale_consistency",
    "solve",
    "solve_lagrangian",
    "solve_milp",
]

logger = logging.getLogger(__name__)

Solver = Literal["auto", "lagrangian", "milp"]

#: Share of the time limit after which ``"auto"`` leaves a gap to the integer program, and the
#: number of picks above which it never does: that program is no help with more in a round's time.
LAGRANGIAN_SHARE = 0.7
MOST_PICKS = 10_000

#: Share of the time limit that breaking ties may take.
TIE_SHARE = 0.1


def solve(
    problem: SelectionProblem,
    *,
    solver: Solver = "auto",
    time_limit: float = 10.0,
    gap: float = 1e-6,
) -> Selection:
    """Pick the layers each client trains.

    Parameters
    ----------
    problem : SelectionProblem
        One round's instance of (P1).
    solver : {"auto", "lagrangian", "milp"}
        ``"auto"`` runs the Lagrangian and, only where that leaves a gap on up to `MOST_PICKS`
        picks, the integer program on what is still undecided, started from the best masks.
        ``"lagrangian"`` never calls the integer program to close a gap, ``"milp"`` always solves
        with it.
    time_limit : float
        Seconds. Checked between single evaluations of a bound, of which one at least is made: some
        milliseconds, but seconds where hundreds of clients have costs on no grid: `round_costs`.
    gap : float
        Relative gap that is good enough.

    Returns
    -------
    Selection
        Within all budgets, with its bound. Ties are broken as
        :mod:`layerfed.selection.canonical` says, so solvers that prove optimality agree on the
        masks.

    Raises
    ------
    ValueError
        If an argument is out of range.
    SelectionError
        If ``"milp"`` was asked for and no backend is installed or none found masks in time.
    """
    _check_arguments(solver, time_limit, gap)
    if problem.consistency == 0.0 and problem.clients > 1:
        return _solve_apart(problem, solver, time_limit, gap)
    return _solve_together(problem, solver, time_limit, gap)


def _solve_together(
    problem: SelectionProblem, solver: Solver, time_limit: float, gap: float
) -> Selection:
    started = time.perf_counter()
    deadline = started + time_limit
    if solver == "milp" and problem.clients:
        selection, reduction = _solve_with_milp(problem, time_limit, gap)
    else:
        both = solver == "auto" and problem.values.size <= MOST_PICKS
        share = LAGRANGIAN_SHARE if both else 1.0
        selection, reduction = certify(problem, time_limit=share * time_limit, gap=gap)
        if both and selection.gap > gap:
            selection = _close_gap(problem, selection, reduction, deadline, gap)
    if selection.gap <= PROVEN:
        limit = min(deadline, time.perf_counter() + TIE_SHARE * time_limit)
        masks = canonicalise(problem, selection.masks, reduction, limit)
        selection = Selection.certified(problem, masks, selection.bound, selection.solver, 0.0)
    if selection.gap > max(gap, PROVEN):
        _warn(selection, gap, time.perf_counter() - started, time_limit)
    return replace(selection, seconds=time.perf_counter() - started)


def _warn(selection: Selection, gap: float, seconds: float, time_limit: float) -> None:
    logger.warning(
        "selection stopped with a relative gap of %.2e (asked: %.2e) after %.2f s (limit: %.2f s) "
        "by %s",
        selection.gap,
        gap,
        seconds,
        time_limit,
        selection.solver,
    )


def _solve_apart(
    problem: SelectionProblem, solver: Solver, time_limit: float, gap: float
) -> Selection:
    """Solve λ = 0, where clients have nothing to do with each other.

    Each client's gains are brought to one scale first: tolerances are relative to the whole instance,
    and a client of small gradients would else be taken for one without any.
    """
    started = time.perf_counter()
    scale = np.abs(problem.values).max(axis=1, keepdims=True)
    scaled = replace(problem, values=problem.values / np.where(scale > 0, scale, 1.0))
    found = _solve_together(scaled, solver, time_limit, gap)
    best = ClientOracle(problem).best(problem.values)
    bound = float(problem.values[best].sum())
    seconds = time.perf_counter() - started
    return Selection.certified(problem, found.masks, bound, found.solver, seconds)


def _check_arguments(solver: str, time_limit: float, gap: float) -> None:
    if solver not in get_args(Solver):
        raise ValueError(f"solver is {solver!r}; expected one of {list(get_args(Solver))}")
    if not time_limit > 0:
        raise ValueError(f"time_limit is {time_limit}; expected seconds above 0")
    if not 0 <= gap < 1:
        raise ValueError(f"gap is {gap}; expected a relative gap in [0, 1)")


def _solve_with_milp(
    problem: SelectionProblem, time_limit: float, gap: float
) -> tuple[Selection, Reduction]:
    """Integer program first; the Lagrangian then supplies what the tie-break needs.

    The program may stop at any masks within `gap`. What the Lagrangian can add to that, a better
    bound or better masks, is taken, or the masks would depend on the solver.
    """
    solved = solve_milp(problem, time_limit=time_limit, gap=gap)
    if solved.gap > gap:
        return solved, Reduction.none(problem)
    proved, reduction = certify(problem, time_limit=time_limit, gap=gap, incumbent=solved.masks)
    if proved.gap > solved.gap:
        return solved, reduction
    name = solved.solver if solved.gap <= PROVEN else f"{solved.solver}+lagrangian"
    return replace(proved, solver=name), reduction


def _close_gap(
    problem: SelectionProblem,
    selection: Selection,
    reduction: Reduction,
    deadline: float,
    gap: float,
) -> Selection:
    """Integer program on the undecided picks, started from `selection` and bounded by it."""
    try:
        closed = solve_milp(
            problem,
            time_limit=max(deadline - time.perf_counter(), 0.01),
            gap=gap,
            incumbent=selection.masks,
            reduction=reduction,
        )
    except SelectionError as error:
        logger.warning("the integer program could not close the gap: %s", error)
        return selection
    return replace(closed, solver=f"{selection.solver}+{closed.solver}")
