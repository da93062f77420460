"""Minimising a Lagrangian bound: deflected subgradient steps of Polyak's length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from layerfed.selection.problem import FloatArray, SelectionProblem
from layerfed.selection.relaxation import Point, Relaxation
from layerfed.selection.search import PrimalSearch

#: Relative gap at which a descent is done.
CLOSED = 1e-10

#: Steps without progress before the step length shrinks, and by how much.
PATIENCE = 12
SHRINK = 0.5

#: A descent has stalled once so many steps took away less than this share of the gap.
STALL = 50
STALL_SHARE = 0.3

#: Share of the newest step in the running averages.
NEWEST = 0.1


@dataclass(frozen=True, eq=False)
class Descent:
    """Where a descent ended.

    Attributes
    ----------
    variables : array
        The best variables.
    points : list of Point
        The last improving evaluations, the best one last.
    counts, penalties : array of shape (L,)
        Running averages, over the steps, of how many clients the layer part gives each layer and
        of what the penalty f is there. The averages of subgradient steps approach a solution of
        the linear program that the bound is the dual of (Larsson, Patriksson & Strömberg,
        *Ergodic, primal convergence in dual subgradient schemes*, 1999), so a difference between
        `penalties` and f at `counts` tells where that program mixes selections.
    """

    variables: FloatArray
    points: list[Point]
    counts: FloatArray
    penalties: FloatArray

    @property
    def bound(self) -> float:
        """The smallest bound reached."""
        return self.points[-1].bound


def descend(
    problem: SelectionProblem,
    search: PrimalSearch,
    relaxation: Relaxation,
    steps: int,
    margin: float = 0.0,
) -> Descent:
    """Minimise the bound until it meets the incumbent, stalls, or time or steps run out.

    Parameters
    ----------
    problem : SelectionProblem
        The instance.
    search : PrimalSearch
        Takes in the masks met on the way; supplies the incumbent and the deadline.
    relaxation : Relaxation
        The bound, and where to start.
    steps : int
        At most so many evaluations.
    margin : float
        Try to get this far below the incumbent: then nothing the bound covers is as good. Where
        that cannot be, a descent ends once the gap is closed and stays so.
    """
    variables = best_variables = relaxation.start
    direction = np.zeros_like(variables)
    best: list[Point] = []
    counts = penalties = np.zeros(problem.layers)
    length, waited, before = 1.0, 0, np.inf
    for step in range(steps):
        point = relaxation.evaluate(variables)
        progress = not best or point.bound < best[-1].bound - 1e-7 * abs(best[-1].bound)
        waited = 0 if progress else waited + 1
        if not best or point.bound < best[-1].bound:
            best, best_variables = [*best[-2:], point], variables
        taken = point.layer_masks.sum(axis=0)
        share = NEWEST if step else 1.0
        counts = counts + share * (taken - counts)
        penalties = penalties + share * (problem.penalties[taken] - penalties)
        if step % 10 == 0 or (step < 20 and progress):
            _settle_from(search, point)
        target = search.objective - margin
        if best[-1].bound <= target or search.late:
            break
        if step % STALL == 0:
            left = best[-1].bound - target
            if left > (1.0 - STALL_SHARE) * before:
                break
            before = left
        closed = problem.relative_gap(search.objective, best[-1].bound) <= CLOSED
        if closed and (margin == 0.0 or waited >= PATIENCE):
            break
        if waited >= PATIENCE:
            length, waited = length * SHRINK, 0
            variables, direction = best_variables, np.zeros_like(direction)
            continue
        direction = point.gradient + relaxation.deflection * direction
        square = float((direction**2).sum())
        if square == 0.0:
            _settle_from(search, point)
            break
        size = length * (point.bound - target) / square
        variables = np.maximum(variables - size * direction, relaxation.floor)
    return Descent(best_variables, best, counts, penalties)


def _settle_from(search: PrimalSearch, point: Point) -> None:
    """Repair what the two parts of the relaxation propose."""
    search.settle(point.layer_masks.sum(axis=0))
    if point.client_masks is not None:
        search.settle(point.client_masks.sum(axis=0))
