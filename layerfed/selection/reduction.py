"""What a bound says about single picks: reduced-cost fixing for (P1).

Forcing one pick in or out of both parts of the decomposition (see
:mod:`layerfed.selection.lagrangian`) bounds every selection with, or without, that pick. Where
that bound falls below the incumbent the pick is decided, and only the rest is left to search.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from layerfed.selection.oracle import ClientOracle
from layerfed.selection.problem import BoolArray, FloatArray, SelectionProblem
from layerfed.selection.relaxation import CountRange, Point, ranked_sums

#: Selections this much worse than the best, relative to the magnitude, count as tied with it.
TIE = 1e-11


@dataclass(frozen=True)
class Reduction:
    """What a certified bound already says about every selection worth looking for.

    Attributes
    ----------
    allow, force : array of bool, shape (n, L)
        ``allow`` is False where picking the layer cannot beat the incumbent, ``force`` True
        where leaving it cannot.
    orders : list of array of int, each of shape (L, n)
        Per layer the clients by falling reduced gain, for the cuts of the module docstring.
    bound : float
        Upper bound on the objective.
    """

    allow: BoolArray
    force: BoolArray
    orders: list[NDArray[np.intp]] = field(default_factory=list)
    bound: float = np.inf

    @classmethod
    def none(cls, problem: SelectionProblem) -> Reduction:
        """Only what needs no bound: unaffordable layers, and an order by value."""
        orders = [np.argsort(-problem.values.T, axis=1, kind="stable")]
        return cls(problem.affordable, np.zeros(problem.values.shape, dtype=bool), orders)

    @property
    def free(self) -> NDArray[np.intp]:
        """Places (client, layer) of the undecided picks, shape (picks, 2)."""
        return np.argwhere(self.allow & ~self.force)


def reduce_problem(
    problem: SelectionProblem,
    oracle: ClientOracle,
    objective: float,
    points: Sequence[Point],
    deadline: float = np.inf,
) -> Reduction:
    """Decide every pick that no selection as good as `objective` has, or lacks.

    Parameters
    ----------
    problem : SelectionProblem
        The instance.
    oracle : ClientOracle
        Of the same instance.
    objective : float
        Objective of the incumbent.
    points : sequence of Point
        Evaluations of the bound on this instance, in the same range of counts. Each decides
        picks of its own; the last one should be the best.
    deadline : float
        ``time.perf_counter()`` value after which fewer picks are decided.
    """
    allow = problem.affordable.copy()
    force = np.zeros(allow.shape, dtype=bool)
    for point in reversed(points):
        loss_in, loss_out = _layer_losses(problem, point)
        if point.client_masks is not None:
            client_in, client_out = _client_losses(problem, oracle, point.prices, deadline)
            loss_in, loss_out = loss_in + client_in, loss_out + client_out
        slack = point.bound - objective + TIE * problem.magnitude
        allow &= loss_in <= slack
        force |= loss_out > slack
    orders = [ranked_sums(problem, point.prices)[0] for point in points[-2:]]
    bound = min(point.bound for point in points)
    return Reduction(allow | force, force, orders, bound)


def possible_counts(
    problem: SelectionProblem, objective: float, point: Point, counts: CountRange
) -> CountRange:
    """Narrow `counts` to those of selections as good as `objective`."""
    totals = ranked_sums(problem, point.prices)[1] + point.penalties
    slack = point.bound - objective + TIE * problem.magnitude
    possible = totals >= totals.max(axis=1, keepdims=True) - slack
    last = problem.clients - possible[:, ::-1].argmax(axis=1)
    return CountRange(
        np.maximum(counts.low, possible.argmax(axis=1)), np.minimum(counts.high, last)
    )


def union(parts: Sequence[Reduction]) -> Reduction:
    """Combine what is known of each part of a search into what is known of all of it."""
    allow = np.logical_or.reduce([part.allow for part in parts])
    force = np.logical_and.reduce([part.force for part in parts])
    orders = [order for part in parts[:2] for order in part.orders[-1:]]
    return Reduction(allow, force, orders, max(part.bound for part in parts))


def _layer_losses(problem: SelectionProblem, point: Point) -> tuple[FloatArray, FloatArray]:
    """What the layer part loses by forcing each pick in, and out; both of shape (n, L)."""
    order, sums = ranked_sums(problem, point.prices)
    n, f = problem.clients, point.penalties
    totals = sums + f
    best = totals.max(axis=1, keepdims=True)
    price = np.diff(sums, axis=1)
    nothing = np.full((problem.layers, 1), -np.inf)
    # Best value over sets of at most r, and of more than r, clients for the rank r = 0..n-1.
    upto = np.maximum.accumulate(totals, axis=1)[:, :n]
    beyond = np.maximum.accumulate(totals[:, ::-1], axis=1)[:, ::-1][:, 1:]
    # Force in the client of rank r: k - 1 better ones and itself (k <= r), or the best k > r.
    joining = np.maximum.accumulate(sums[:, :n] + f[:, 1:], axis=1)
    joining = np.hstack([nothing, joining[:, :-1]])
    forced_in = np.maximum(beyond, joining + price)
    # Force it out: the best k <= r, or k + 1 best ones without it (k > r).
    leaving = np.maximum.accumulate((sums[:, 1:] + f[:, :n])[:, ::-1], axis=1)[:, ::-1]
    leaving = np.hstack([leaving[:, 1:], nothing])
    forced_out = np.maximum(upto, leaving - price)
    losses = []
    for forced in (forced_in, forced_out):
        loss = np.empty_like(forced)
        np.put_along_axis(loss, order, best - forced, axis=1)
        losses.append(loss.T)
    return losses[0], losses[1]


def _client_losses(
    problem: SelectionProblem, oracle: ClientOracle, prices: FloatArray, deadline: float
) -> tuple[FloatArray, FloatArray]:
    """What the client part loses by forcing each pick in, and out; both of shape (n, L).

    Layers that the time does not suffice for count as losing nothing, which is always true.
    """
    rest = problem.values - prices
    loss_in, loss_out = np.zeros(rest.shape), np.zeros(rest.shape)
    best = np.where(oracle.best(rest), rest, 0.0).sum(axis=1)
    surely = 1.0 + 2.0 * np.abs(rest).sum()
    for layer in range(problem.layers):
        if time.perf_counter() > deadline:
            break
        scores = rest.copy()
        scores[:, layer] = surely
        total = np.where(oracle.best(scores), rest, 0.0).sum(axis=1)
        loss_in[:, layer] = best - total
        scores[:, layer] = 0.0
        total = np.where(oracle.best(scores), scores, 0.0).sum(axis=1)
        loss_out[:, layer] = best - total
    return loss_in, loss_out
