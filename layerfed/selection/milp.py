"""(P1) solved exactly with PuLP: HiGHS first, CBC where HiGHS is missing."""

from __future__ import annotations

import logging
import time

import numpy as np

from layerfed.selection.backends import Backend, pick_backend, run_backend
from layerfed.selection.count_model import CountModel
from layerfed.selection.problem import (
    BoolArray,
    Selection,
    SelectionError,
    SelectionProblem,
)
from layerfed.selection.reduction import Reduction

logger = logging.getLogger(__name__)

#: Share of the time limit that writing the model down may take. Handing it over and reading the
#: answer take as long again, and a model this large has no chance in what is left.
BUILD_SHARE = 0.15


def solve_milp(
    problem: SelectionProblem,
    *,
    time_limit: float = 10.0,
    gap: float = 1e-6,
    incumbent: BoolArray | None = None,
    backend: Backend = "auto",
    reduction: Reduction | None = None,
) -> Selection:
    """Solve (P1) exactly with PuLP.

    Parameters
    ----------
    problem : SelectionProblem
        The instance.
    time_limit : float
        Seconds, of which writing the model down may take `BUILD_SHARE`. CBC looks at its clock
        seldom and may run on for minutes; HiGHS keeps to it.
    gap : float
        Relative gap at which the solver may stop.
    incumbent : array of bool, shape (n, L), optional
        Feasible masks to start from. The result is never worse.
    backend : {"auto", "highs", "cbc"}
        ``"auto"``: HiGHS where it is installed, else CBC.
    reduction : Reduction, optional
        Variables fixed and cuts found from a bound; it must belong to `incumbent`.

    Returns
    -------
    Selection
        With the backend's own bound.

    Raises
    ------
    ValueError
        If `incumbent` is not feasible.
    SelectionError
        If the backend is missing or failed, the program is too large to be written down in time,
        or no masks were found and there is no incumbent.
    """
    started = time.perf_counter()
    if incumbent is not None and not problem.feasible(incumbent):
        raise ValueError("the incumbent exceeds a budget; expected masks within all budgets")
    name = pick_backend(backend)
    deadline = started + time_limit
    known = reduction or Reduction.none(problem)
    model = CountModel(problem, known, started + BUILD_SHARE * time_limit)
    if incumbent is not None:
        model.start_from(incumbent)
    masks: BoolArray | None = model.masks()
    bound = model.constant
    if not model.empty:
        solved, bound = run_backend(name, model, deadline, gap, warm=incumbent is not None)
        masks = _within_budgets(problem, model.masks()) if solved else None
    masks = _better(problem, masks, incumbent, f"{name} in {time_limit} s")
    if reduction is not None:
        bound = min(bound, reduction.bound)
        # What was fixed away scores at most the incumbent, hence at most `masks`.
        bound = max(bound, problem.objective(masks))
    seconds = time.perf_counter() - started
    return Selection.certified(problem, masks, bound, f"milp-{name}", seconds)


def _better(
    problem: SelectionProblem, masks: BoolArray | None, incumbent: BoolArray | None, run: str
) -> BoolArray:
    """Return the better of two masks, of which at least one must be there."""
    if masks is not None and (
        incumbent is None or problem.objective(masks) > problem.objective(incumbent)
    ):
        return masks
    if incumbent is None:
        raise SelectionError(
            f"no masks for {problem.clients} clients x {problem.layers} layers from {run}: raise "
            "the time limit or use the solver 'auto'"
        )
    if masks is None:
        logger.warning("no masks from %s; keeping the incumbent", run)
    return incumbent.copy()


def _within_budgets(problem: SelectionProblem, masks: BoolArray) -> BoolArray:
    """Drop picks until budgets hold exactly: the solver works to a tolerance of its own."""
    masks = masks.copy()
    for client in np.flatnonzero(problem.spent(masks) > problem.limits):
        for layer in np.argsort(problem.values[client]):
            masks[client, layer] = False
            if problem.spent(masks)[client] <= problem.limits[client]:
                break
    return masks
