r"""Branching on how many clients pick a layer, where the Lagrangian bound alone leaves a gap.

The bound's layer part maximises over counts, so with λ > 0 it may mix: at the best prices a layer
is as good with a handful of clients as with nearly all of them, and the linear program behind the
bound takes some of each. No selection can, and that is the gap. (With independent gains this is a
phase transition: near one λ, picking alone and picking together are equally good.) Forbidding the
counts in between, first above and then below, takes it away: the two parts together cover every
selection, and each has a bound of its own, from the same descent over fewer counts.

The layer to branch on is where mixing gains the bound most, by Jensen's difference
``mean f(k_l) - f(mean k_l)`` over the steps of the descent, at the mean count. Parts are taken up
by falling bound; those that fall below the incumbent are done. A handful of layers near the
transition is all there is to branch on: others keep their side by a single bound
(:func:`~layerfed.selection.reduction.possible_counts`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from layerfed.selection.descent import CLOSED, Descent, descend
from layerfed.selection.oracle import ClientOracle
from layerfed.selection.problem import SelectionProblem
from layerfed.selection.reduction import TIE, possible_counts
from layerfed.selection.relaxation import CountRange, relax
from layerfed.selection.search import PrimalSearch

#: Steps of a part's descent, which starts where its parent's ended.
PART_STEPS = 200


@dataclass(frozen=True, eq=False)
class Part:
    """The selections with counts in a range, and the descent that bounds them."""

    counts: CountRange
    descent: Descent

    @property
    def bound(self) -> float:
        """No selection of this part is better."""
        return self.descent.bound


def branch(
    problem: SelectionProblem, oracle: ClientOracle, search: PrimalSearch, parts: list[Part]
) -> list[Part]:
    """Split `parts` until their bounds meet the incumbent, or time runs out.

    Parameters
    ----------
    problem : SelectionProblem
        The instance.
    oracle : ClientOracle
        Of the same instance.
    search : PrimalSearch
        Keeps the incumbent and the deadline.
    parts : list of Part
        What to split; best bound first.

    Returns
    -------
    list of Part
        They cover every selection of `parts` as good as the incumbent; best bound first, never
        empty.
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
    counts = possible_counts(problem, search.objective, part.descent.points[-1], part.counts)
    mean = part.descent.counts
    at_mean = -problem.consistency * mean * (problem.clients - mean)
    gain = np.where(counts.low < counts.high, part.descent.penalties - at_mean, 0.0)
    layer = int(gain.argmax())
    if gain[layer] <= TIE * problem.magnitude:
        return []
    most = int(np.clip(np.floor(mean[layer]), counts.low[layer], counts.high[layer] - 1))
    below, above = counts.high.copy(), counts.low.copy()
    below[layer], above[layer] = most, most + 1
    ranges = [CountRange(counts.low, below), CountRange(above, counts.high)]
    slopes = search.slopes(search.masks.sum(axis=0))
    children = []
    for within in ranges:
        relaxation = relax(problem, oracle, slopes, within)
        relaxation = replace(relaxation, start=part.descent.variables)
        margin = 2.0 * TIE * problem.magnitude
        children.append(Part(within, descend(problem, search, relaxation, PART_STEPS, margin)))
    return children
