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
    """

    bound: float
    prices: FloatArray
    layer_masks: BoolArray
    client_masks: BoolArray | None
    gradient: FloatArray


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


def relax(problem: SelectionProblem, oracle: ClientOracle, slopes: FloatArray) -> Relaxation:
    """Pick the relaxation with the fewest variables that loses nothing.

    Parameters
    ----------
    problem : SelectionProblem
        The instance.
    oracle : ClientOracle
        Of the same instance.
    slopes : array of shape (L,)
        Slope of the penalty at good counts; the start is derived from it.
    """
    dual = _budget_dual if oracle.integral else _split_dual
    return dual(problem, oracle, slopes)


def _budget_dual(problem: SelectionProblem, oracle: ClientOracle, slopes: FloatArray) -> Relaxation:
    """Bound as a function of one multiplier per budget, and a start for it, shape (n,)."""
    assert oracle.room is not None
    room = oracle.room
    taken = np.minimum(room, problem.layers).astype(int)

    def evaluate(multipliers: FloatArray) -> Point:
        prices = problem.values - multipliers[:, None]
        total, masks = layer_part(problem, prices)
        gradient = room - masks.sum(axis=1)
        # At its floor a multiplier cannot fall further, so that direction is no descent.
        gradient = np.where((multipliers <= 0) & (gradient > 0), 0.0, gradient)
        bound = total + float(multipliers @ taken)
        return Point(bound, prices, masks, None, gradient)

    # The last score a client can afford and the first it cannot enclose its multiplier.
    scores = -np.sort(-(problem.values + slopes), axis=1)
    rows = np.arange(problem.clients)
    inside = scores[rows, np.maximum(taken - 1, 0)]
    outside = np.where(
        taken < problem.layers, scores[rows, np.minimum(taken, problem.layers - 1)], 0
    )
    start = np.maximum(0.0, (inside + np.maximum(outside, 0.0)) / 2)
    return Relaxation(evaluate, start, floor=0.0, deflection=0.0)


def _split_dual(problem: SelectionProblem, oracle: ClientOracle, slopes: FloatArray) -> Relaxation:
    """Bound as a function of the prices, and a start for them, shape (n, L)."""

    def evaluate(prices: FloatArray) -> Point:
        total, masks = layer_part(problem, prices)
        rest = problem.values - prices
        picks = oracle.best(rest)
        gradient = masks.astype(np.float64) - picks
        return Point(total + float(rest[picks].sum()), prices, masks, picks, gradient)

    # Clients then see the scores they settled on, and layers the other side of that slope.
    start = np.broadcast_to(-slopes, problem.values.shape).copy()
    return Relaxation(evaluate, start, floor=-np.inf, deflection=DEFLECTION)


def layer_part(problem: SelectionProblem, prices: FloatArray) -> tuple[float, BoolArray]:
    """Value and masks (n, L) of the layers' best sets of clients at `prices` (n, L)."""
    by_layer = _offers(problem, prices)
    ranked = -np.sort(-by_layer, axis=1)
    totals = _totals(problem, ranked)
    counts = totals.argmax(axis=1)
    value = float(np.take_along_axis(totals, counts[:, None], axis=1).sum())
    return value, largest(by_layer, ranked, counts).T


def prefix_totals(
    problem: SelectionProblem, prices: FloatArray
) -> tuple[NDArray[np.intp], FloatArray]:
    """Clients by falling price (L, n), and per count the best layer value (L, n+1)."""
    by_layer = _offers(problem, prices)
    order = np.argsort(-by_layer, axis=1, kind="stable")
    return order, _totals(problem, np.take_along_axis(by_layer, order, axis=1))


def _offers(problem: SelectionProblem, prices: FloatArray) -> FloatArray:
    """Prices by layer, shape (L, n), hopeless where the client cannot afford the layer."""
    # A finite stand-in for -inf keeps sums of several of them comparable.
    excluded = -1e6 * (problem.magnitude + 1.0)
    return np.ascontiguousarray(np.where(problem.affordable, prices, excluded).T)


def _totals(problem: SelectionProblem, ranked: FloatArray) -> FloatArray:
    """Best value of each layer at the counts 0..n, from its falling prices (L, n)."""
    totals = np.zeros((problem.layers, problem.clients + 1))
    np.cumsum(ranked, axis=1, out=totals[:, 1:])
    totals += problem.penalties
    return totals
