"""One answer among equals: the tie-break, the same for every solver.

Of all selections whose objective equals the best up to rounding, the one kept has

1. the fewest picks: a layer that gains nothing is not worth a client's compute; then
2. the first pick at the first place where two of them differ, reading clients in their order and
   each client's layers from the output to the input: of equal layers the one nearer the output
   needs the shorter backward pass.

This depends on the problem alone, not on who solved it or what was found first. It holds whenever
the selection is proved optimal (gap at most `PROVEN`) and the tie is resolved in time: the picks
left undecided by :class:`~layerfed.selection.reduction.Reduction` contain every tied selection, so
up to `ENUMERATED` of them are enumerated and more are left to the integer program. Otherwise the
masks stay as the solver found them.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerfed.selection.backends import pick_backend, run_backend
from layerfed.selection.count_model import CountModel
from layerfed.selection.problem import BoolArray, SelectionError, SelectionProblem
from layerfed.selection.reduction import TIE, Reduction

logger = logging.getLogger(__name__)

#: Up to this many undecided picks, all 2^picks selections are compared directly.
ENUMERATED = 10

#: Picks ranked by one integer program; more digits would drown in the solver's tolerance.
PICKS_AT_ONCE = 12

#: More undecided picks than this are not worth a round's time.
MOST_PICKS = 400


def canonicalise(
    problem: SelectionProblem, masks: BoolArray, reduction: Reduction, deadline: float
) -> BoolArray:
    """Return the canonical one of the selections tied with `masks`.

    Parameters
    ----------
    problem : SelectionProblem
        The instance.
    masks : array of bool, shape (n, L)
        An optimal selection.
    reduction : Reduction
        What is decided about every selection as good as `masks`.
    deadline : float
        ``time.perf_counter()`` value after which the tie stays as it is.

    Returns
    -------
    array of bool, shape (n, L)
        `masks` themselves if the optimum is unique, or the tie could not be resolved.
    """
    free = reduction.free
    if len(free) == 0:
        return masks
    if len(free) <= ENUMERATED:
        return _enumerate(problem, masks, reduction)
    left = deadline - time.perf_counter()
    if len(free) <= MOST_PICKS and left > 0:
        try:
            return _optimise_rules(problem, masks, reduction, left)
        except SelectionError as error:
            logger.info("tie left as found: %s", error)
            return masks
    logger.info("tie left as found: %d undecided picks, %.3g s left", len(free), left)
    return masks


def reading_order(places: NDArray[np.intp]) -> NDArray[np.intp]:
    """Sort places (client, layer), shape (picks, 2), into the order of rule 2."""
    return places[np.lexsort((-places[:, 1], places[:, 0]))]


def _enumerate(problem: SelectionProblem, masks: BoolArray, reduction: Reduction) -> BoolArray:
    places = reading_order(reduction.free)
    least = problem.objective(masks) - TIE * problem.magnitude
    best, best_key = masks, _key(masks, places)
    for code in range(2 ** len(places)):
        candidate = reduction.force.copy()
        bits = code >> np.arange(len(places)) & 1
        candidate[places[:, 0], places[:, 1]] = bits.astype(bool)
        key = _key(candidate, places)
        if key < best_key and problem.objective(candidate) >= least and problem.feasible(candidate):
            best, best_key = candidate, key
    return best


def _key(masks: BoolArray, places: NDArray[np.intp]) -> tuple[int, ...]:
    """Sort key: smaller is preferred."""
    return (int(masks.sum()), *(~masks[places[:, 0], places[:, 1]]).astype(int).tolist())


def _optimise_rules(
    problem: SelectionProblem, masks: BoolArray, reduction: Reduction, time_limit: float
) -> BoolArray:
    """Fix the objective at its optimum and optimise one rule after the other.

    First comes the question whether any other selection is as good: mostly not, and the answer
    costs one program instead of one per `PICKS_AT_ONCE` undecided picks.
    """
    deadline = time.perf_counter() + time_limit
    model = CountModel(problem, reduction, deadline)
    model.keep_objective(masks)
    picks = model.picks(reading_order(reduction.free))
    backend = pick_backend("auto")

    def minimise(terms: list[tuple[Any, float]]) -> BoolArray:
        model.minimise(terms)
        late = time.perf_counter() > deadline
        if late or not run_backend(backend, model, deadline, 0.0, proven=True)[0]:
            raise SelectionError(f"{len(picks)} picks not resolved in {time_limit:.3g} s")
        return model.masks()

    chosen = [bool(masks[tuple(place)]) for place in reading_order(reduction.free)]
    same = [(pick, 1.0 if on else -1.0) for pick, on in zip(picks, chosen, strict=True)]
    found = minimise(same)
    if np.array_equal(found, masks):
        return masks
    found = minimise([(pick, 1.0) for pick in picks])
    model.fix_count(picks, int(found.sum()))
    for first in range(0, len(picks), PICKS_AT_ONCE):
        digits = picks[first : first + PICKS_AT_ONCE]
        found = minimise([(pick, -(2.0**rank)) for rank, pick in enumerate(reversed(digits))])
        model.fix(digits)
    least = problem.objective(masks) - 10 * TIE * problem.magnitude
    if not problem.feasible(found) or problem.objective(found) < least:
        raise SelectionError("the solver's tolerance hides the difference between selections")
    return found
