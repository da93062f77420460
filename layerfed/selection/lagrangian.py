r"""The Lagrangian solver of (P1): a descent on the bound, and branching on counts if a gap is left.

The bound (:mod:`~layerfed.selection.bound`) meets the incumbent within a few dozen steps on most
instances. If it does not, its layer part is mostly the reason, because it maximises over counts. With
λ > 0 and the best prices, a layer is as good with a handful of clients as with nearly all of them.
The linear program behind the bound takes some of each; no selection can, and that is the gap. (With
independent gains this is a phase transition: near one λ, individual and common choices are equally
good.)

Branching removes the gap. It splits the selections in two parts: those with at most k clients on the
layer, and those with more. Each part gets its own bound, from the same descent over fewer counts.

The layer to branch on is the one whose mixing raises the bound most, by Jensen's difference
``mean f(k_l) - f(mean k_l)`` over the steps of the descent; k is its mean count. Parts are processed
by falling bound, and a part whose bound is below the incumbent is done. Only a handful of layers, near
the transition, need branching.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from layerfed.selection.bound import CLOSED, Descent, descend, penalties_of, relax
from layerfed.selection.knapsack import ClientOracle
from layerfed.selection.problem import Selection, SelectionProblem, proof_gap
from layerfed.selection.search import PrimalSearch

#: A selection ties with the best if it is worse by at most this share of the magnitude.
TIE = 1e-11

#: Most steps of the first descent; if it closes the gap at all, a few dozen steps do.
MAX_STEPS = 600

#: Most steps of a part's descent, which starts where its parent's ended.
PART_STEPS = 200


def solve_lagrangian(
    problem: SelectionProblem, *, time_limit: float = 10.0, gap: float = 1e-6
) -> Selection:
    """Solve (P1) with the Lagrangian bound and branching.

    Parameters
    ----------
    problem : SelectionProblem
        The instance.
    time_limit : float
        Seconds.
    gap : float
        Relative gap below which no part is split.

    Returns
    -------
    Selection
        Feasible masks with a valid bound. The gap may stay positive: this method cannot always close
        it, as the integer program can.
    """
    started = time.perf_counter()
    working = problem.saturated()
    oracle = ClientOracle(working)
    search = PrimalSearch(working, oracle, started + time_limit)
    bound = 0.0
    if working.clients:
        search.settle(np.zeros(working.layers))
        search.settle(oracle.best(working.values).sum(axis=0))
        slopes = search.slopes(search.masks.sum(axis=0))
        relaxation = relax(working, oracle, slopes, penalties_of(working))
        parts = [descend(working, search, relaxation, MAX_STEPS)]
        if working.relative_gap(search.objective, parts[0].bound) > proof_gap(gap):
            parts = branch(working, oracle, search, parts)
        bound = parts[0].bound
    seconds = time.perf_counter() - started
    return Selection.certified(problem, search.masks, bound, "lagrangian", seconds)


def branch(
    problem: SelectionProblem, oracle: ClientOracle, search: PrimalSearch, parts: list[Descent]
) -> list[Descent]:
    """Split `parts` until their bounds meet the incumbent, or time runs out.

    The returned parts cover every selection of `parts` that is as good as the incumbent of `search`.
    They are sorted by falling bound and never empty.
    """
    while not search.late:
        part = parts[0]
        if problem.relative_gap(search.objective, part.bound) <= CLOSED:
            break
        children = _split(problem, oracle, search, part)
        if not children:
            break
        least = search.objective - TIE * problem.magnitude
        parts = [other for other in [*parts[1:], *children] if other.bound >= least]
        parts = sorted(parts, key=lambda other: -other.bound) or [children[0]]
    return parts


def _split(
    problem: SelectionProblem, oracle: ClientOracle, search: PrimalSearch, part: Descent
) -> list[Descent]:
    """Return two parts that cover `part`, or none if its bound mixes no counts."""
    slack, mean = TIE * problem.magnitude, part.counts
    allowed = np.isfinite(part.relaxation.penalties)
    at_mean = -problem.consistency * mean * (problem.clients - mean)
    gain = np.where(allowed.sum(axis=1) > 1, part.penalties - at_mean, 0.0)
    layer = int(gain.argmax())
    if gain[layer] <= slack:
        return []
    low, high = np.flatnonzero(allowed[layer])[[0, -1]]
    most = int(np.clip(np.floor(mean[layer]), low, high - 1))
    below, above = (part.relaxation.penalties.copy() for _ in range(2))
    below[layer, most + 1 :], above[layer, : most + 1] = -np.inf, -np.inf
    slopes = search.slopes(search.masks.sum(axis=0))
    children = []
    for penalties in (below, above):
        relaxation = relax(problem, oracle, slopes, penalties)
        relaxation = replace(relaxation, start=part.variables)
        children.append(descend(problem, search, relaxation, PART_STEPS, 2.0 * slack))
    return children
