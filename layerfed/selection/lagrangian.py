r"""(P1) by its Lagrangian bound: a descent, and branching on counts where that leaves a gap.

The bound (:mod:`~layerfed.selection.bound`) meets the incumbent within a few dozen steps on most
instances. Where it does not, the reason is mostly that its layer part maximises over counts: with
λ > 0, at the best prices, a layer is as good with a handful of clients as with nearly all of them,
and the linear program behind the bound takes some of each. No selection can, and that is the gap.
(With independent gains this is a phase transition: near one λ, picking alone and picking together
are equally good.) Forbidding the counts in between, first above and then below, takes it away: the
two parts together cover every selection, and each has a bound of its own, from the same descent
over fewer counts.

The layer to branch on is where mixing gains the bound most, by Jensen's difference
``mean f(k_l) - f(mean k_l)`` over the steps of the descent, at the mean count. Parts are taken up
by falling bound; those that fall below the incumbent are done. A handful of layers near the
transition is all there is to branch on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from layerfed.selection.bound import CLOSED, Descent, descend, penalties_of, relax
from layerfed.selection.knapsack import ClientOracle
from layerfed.selection.problem import FloatArray, Selection, SelectionProblem, proof_gap
from layerfed.selection.search import PrimalSearch

#: Selections this much worse than the best, relative to the magnitude, count as tied with it.
TIE = 1e-11

#: Steps of the first descent; instances that it closes are closed within a few dozen.
MAX_STEPS = 600

#: Steps of a part's descent, which starts where its parent's ended.
PART_STEPS = 200


@dataclass(frozen=True, eq=False)
class Part:
    """The selections whose counts `penalties` (L, n + 1) allow, and the descent that bounds them."""

    penalties: FloatArray
    descent: Descent

    @property
    def bound(self) -> float:
        """No selection of this part is better."""
        return self.descent.point.bound


def solve_lagrangian(
    problem: SelectionProblem, *, time_limit: float = 10.0, gap: float = 1e-6
) -> Selection:
    """Solve (P1) by its Lagrangian bound.

    Parameters
    ----------
    problem : SelectionProblem
        The instance.
    time_limit : float
        Seconds.
    gap : float
        No part is split once the relative gap is at most this.

    Returns
    -------
    Selection
        Feasible masks with a valid bound. The gap may stay positive: unlike the integer program
        this method cannot always close it.
    """
    started = time.perf_counter()
    working = problem.saturated()
    oracle = ClientOracle(working)
    search = PrimalSearch(working, oracle, started + time_limit)
    bound = 0.0
    if working.clients:
        search.settle(np.zeros(working.layers))
        search.settle(oracle.best(working.values).sum(axis=0))
        penalties, slopes = penalties_of(working), search.slopes(search.masks.sum(axis=0))
        relaxation = relax(working, oracle, slopes, penalties)
        parts = [Part(penalties, descend(working, search, relaxation, MAX_STEPS))]
        if working.relative_gap(search.objective, parts[0].bound) > proof_gap(gap):
            parts = branch(working, oracle, search, parts)
        bound = parts[0].bound
    seconds = time.perf_counter() - started
    return Selection.certified(problem, search.masks, bound, "lagrangian", seconds)


def branch(
    problem: SelectionProblem, oracle: ClientOracle, search: PrimalSearch, parts: list[Part]
) -> list[Part]:
    """Split `parts` until their bounds meet the incumbent, or time runs out.

    Returns parts that cover every selection of `parts` as good as the incumbent of `search`; best
    bound first, never empty.
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
    problem: SelectionProblem, oracle: ClientOracle, search: PrimalSearch, part: Part
) -> list[Part]:
    """Two parts that cover `part`, or none where its bound mixes no counts."""
    descent, slack = part.descent, TIE * problem.magnitude
    allowed = np.isfinite(part.penalties)
    mean = descent.counts
    at_mean = -problem.consistency * mean * (problem.clients - mean)
    gain = np.where(allowed.sum(axis=1) > 1, descent.penalties - at_mean, 0.0)
    layer = int(gain.argmax())
    if gain[layer] <= slack:
        return []
    low, high = np.flatnonzero(allowed[layer])[[0, -1]]
    most = int(np.clip(np.floor(mean[layer]), low, high - 1))
    below, above = part.penalties.copy(), part.penalties.copy()
    below[layer, most + 1 :], above[layer, : most + 1] = -np.inf, -np.inf
    slopes = search.slopes(search.masks.sum(axis=0))
    children = []
    for penalties in (below, above):
        relaxation = relax(problem, oracle, slopes, penalties)
        relaxation = replace(relaxation, start=descent.variables)
        found = descend(problem, search, relaxation, PART_STEPS, 2.0 * slack)
        children.append(Part(penalties, found))
    return children
