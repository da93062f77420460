"""The two Lagrangian bounds on (P1), evaluated at given prices.

The derivation is in :mod:`layerfed.selection.lagrangian`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layerfed.selection.oracle import ClientOracle, largest
from layerfed.selection.problem import BoolArray, FloatArray, SelectionProblem

#: Share of the previous direction kept when stepping in the prices.
DEFLECTION = 0.5


@dataclass(frozen=True)
class Point:
    """One evaluation of the bound.

    Attributes
    ----------
    bound : float
        B, an upper bound on (P1).
    prices : array of shape (n, L)
        The prices ``u`` the layers saw.
    layer_masks : array of bool, shape (n, L)
        Maximisers of the layer part.
    client_masks : array of bool, shape (n, L), or None
        Maximisers of the client part, where it has any.
    gradient : array
        Subgradient of B in the variables stepped in.
    penalties : array of shape (L, n + 1)
        f of each layer and count that B was evaluated with; ``-inf`` rules a count out.
    """

    bound: float
    prices: FloatArray
    layer_masks: BoolArray
    client_masks: BoolArray | None
    gradient: FloatArray
    penalties: FloatArray


@dataclass(frozen=True)
class Relaxation:
    """A bound as a function of some variables, and how to step in them.

    Attributes
    ----------
    evaluate : callable
        Maps variables to a :class:`Point`.
    start : array
        Variables to start from.
    floor : float
        Smallest legal value of a variable.
    deflection : float
        Share of the previous direction to keep in a step.
    """

    evaluate: Callable[[FloatArray], Point]
    start: FloatArray
    floor: float
    deflection: float


@dataclass(frozen=True, eq=False)
class CountRange:
    """How many clients may pick each layer: from `low` to `high`, shape (L,) each."""

    low: NDArray[np.intp]
    high: NDArray[np.intp]

    @classmethod
    def whole(cls, problem: SelectionProblem) -> CountRange:
        """Every count that the budgets leave."""
        able = problem.affordable.sum(axis=0)
        return cls(np.zeros_like(able), able)

    def penalties(self, problem: SelectionProblem) -> FloatArray:
        """Value f of each layer's counts 0..n, shape (L, n + 1), ``-inf`` outside the range."""
        counts = np.arange(problem.clients + 1)
        inside = (counts >= self.low[:, None]) & (counts <= self.high[:, None])
        return np.where(inside, problem.penalties, -np.inf)


def relax(
    problem: SelectionProblem, oracle: ClientOracle, slopes: FloatArray, counts: CountRange
) -> Relaxation:
    """Pick the relaxation with the fewest variables that loses nothing.

    Parameters
    ----------
    problem : SelectionProblem
        The instance.
    oracle : ClientOracle
        Of the same instance.
    slopes : array of shape (L,)
        Slope of the penalty at good counts; the start is derived from it.
    counts : CountRange
        Selections outside this range are none of the bound's business.
    """
    dual = _budget_dual if oracle.integral else _split_dual
    return dual(problem, oracle, slopes, counts.penalties(problem))


def _budget_dual(
    problem: SelectionProblem, oracle: ClientOracle, slopes: FloatArray, penalties: FloatArray
) -> Relaxation:
    """Bound as a function of one multiplier per budget, and a start for it, shape (n,)."""
    assert oracle.room is not None
    room = oracle.room
    taken = np.minimum(room, problem.layers).astype(int)

    def evaluate(multipliers: FloatArray) -> Point:
        prices = problem.values - multipliers[:, None]
        total, masks = layer_part(problem, prices, penalties)
        gradient = room - masks.sum(axis=1)
        # At its floor a multiplier cannot fall further, so that direction is no descent.
        gradient = np.where((multipliers <= 0) & (gradient > 0), 0.0, gradient)
        bound = total + float(multipliers @ taken)
        return Point(bound, prices, masks, None, gradient, penalties)

    # The last score a client can afford and the first it cannot enclose its multiplier.
    scores = -np.sort(-(problem.values + slopes), axis=1)
    rows = np.arange(problem.clients)
    inside = scores[rows, np.maximum(taken - 1, 0)]
    outside = np.where(
        taken < problem.layers, scores[rows, np.minimum(taken, problem.layers - 1)], 0
    )
    start = np.maximum(0.0, (inside + np.maximum(outside, 0.0)) / 2)
    return Relaxation(evaluate, start, floor=0.0, deflection=0.0)


def _split_dual(
    problem: SelectionProblem, oracle: ClientOracle, slopes: FloatArray, penalties: FloatArray
) -> Relaxation:
    """Bound as a function of the prices, and a start for them, shape (n, L)."""

    def evaluate(prices: FloatArray) -> Point:
        total, masks = layer_part(problem, prices, penalties)
        rest = problem.values - prices
        picks = oracle.best(rest)
        gradient = masks.astype(np.float64) - picks
        bound = total + float(rest[picks].sum())
        return Point(bound, prices, masks, picks, gradient, penalties)

    # Clients then see the scores they settled on, and layers the other side of that slope.
    start = np.broadcast_to(-slopes, problem.values.shape).copy()
    return Relaxation(evaluate, start, floor=-np.inf, deflection=DEFLECTION)


def layer_part(
    problem: SelectionProblem, prices: FloatArray, penalties: FloatArray
) -> tuple[float, BoolArray]:
    """Value and masks (n, L) of the layers' best sets of clients at `prices` (n, L)."""
    by_layer = _offers(problem, prices)
    ranked = -np.sort(-by_layer, axis=1)
    totals = _prefix_sums(ranked) + penalties
    counts = totals.argmax(axis=1)
    value = float(np.take_along_axis(totals, counts[:, None], axis=1).sum())
    return value, largest(by_layer, ranked, counts).T


def ranked_sums(
    problem: SelectionProblem, prices: FloatArray
) -> tuple[NDArray[np.intp], FloatArray]:
    """Clients by falling price (L, n), and the sums of their first 0..n prices (L, n + 1)."""
    by_layer = _offers(problem, prices)
    order = np.argsort(-by_layer, axis=1, kind="stable")
    return order, _prefix_sums(np.take_along_axis(by_layer, order, axis=1))


def _offers(problem: SelectionProblem, prices: FloatArray) -> FloatArray:
    """Prices by layer, shape (L, n), hopeless where the client cannot afford the layer."""
    # A finite stand-in for -inf keeps sums of several of them comparable.
    excluded = -1e6 * (problem.magnitude + 1.0)
    return np.ascontiguousarray(np.where(problem.affordable, prices, excluded).T)


def _prefix_sums(ranked: FloatArray) -> FloatArray:
    sums = np.zeros((ranked.shape[0], ranked.shape[1] + 1))
    np.cumsum(ranked, axis=1, out=sums[:, 1:])
    return sums
