r"""The Lagrangian bound on (P1): its value at given prices, and the descent that lowers it.

Derivation
----------
Write (P1) with the penalty as a function f of the counts (see :class:`SelectionProblem`). Give every
pick two copies: ``m`` for the layers, which have the counts, and ``x`` for the clients, which have the
budgets. Relaxing ``m = x`` with prices ``u`` of shape (n, L) splits the problem:

.. math::

    B(u) = \sum_l \max_{m_{\cdot l}} \Big[\sum_i u_{il} m_{il} + f\big(\sum_i m_{il}\big)\Big]
         + \sum_i \max_{x_i\ \text{affordable}} \sum_l (v_{il} - u_{il})\, x_{il}
         \;\ge\; \text{(P1)}

for every ``u`` (weak duality; Guignard & Kim, *Lagrangean decomposition*, 1987).

- *Layer part.* For a fixed count k the best set is the k clients with the largest prices. So: sort,
  cumulate, add f(k), and take the best k. This is exact for any f of the count, convex or concave.
- *Client part.* Each client has a knapsack. :class:`~layerfed.selection.knapsack.ClientOracle` solves
  it exactly, depth costs included.

With equal costs and no depth costs the knapsack polytope is integral. The prices can then be
restricted to ``u_il = v_il - μ_i c_il``, with one multiplier ``μ_i >= 0`` for each budget, without
loss. That gives n variables in place of n L, and the client part becomes ``μ_i R_i``. This is the
classic relaxation of the budgets.

B is convex and piecewise linear. Its subgradient is ``m - x`` for the prices, and
``R_i - sum_l c_il m_il`` for the multipliers. Steps have Polyak's length (*Introduction to
Optimization*, 1987), ``θ (B(u) - objective of the incumbent) / |g|²``. If bound and incumbent meet,
the target is exact and the steps converge linearly. For the prices, steps follow the subgradient
deflected by the previous direction (Camerini, Fratta & Maffioli, 1975).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from layerfed.selection.knapsack import ClientOracle, largest
from layerfed.selection.problem import BoolArray, FloatArray, SelectionProblem
from layerfed.selection.search import PrimalSearch

#: Share of the previous direction kept when stepping in the prices.
DEFLECTION = 0.5

#: Relative gap at which a descent is done.
CLOSED = 1e-10

#: Steps without progress before the step length shrinks, and by how much.
PATIENCE = 12
SHRINK = 0.5

#: A descent has stalled if `STALL` steps close less than `STALL_SHARE` of the gap.
STALL = 50
STALL_SHARE = 0.3

#: Share of the newest step in the running averages.
NEWEST = 0.1


def penalties_of(problem: SelectionProblem) -> FloatArray:
    """Return f of each layer's counts 0..n, shape (L, n + 1); ``-inf`` if budgets exclude a count."""
    able = problem.affordable.sum(axis=0)
    counts = np.arange(problem.clients + 1)
    return np.where(counts <= able[:, None], problem.penalties, -np.inf)


@dataclass(frozen=True)
class Point:
    """One evaluation of the bound: B, the masks of both parts (n, L), and B's subgradient.

    `client_masks` is None with multipliers, whose client part has no masks.
    """

    bound: float
    layer_masks: BoolArray
    client_masks: BoolArray | None
    gradient: FloatArray


@dataclass(frozen=True)
class Relaxation:
    """A bound as a function of some variables, and the rules for steps in them.

    It holds for the selections whose counts `penalties` (L, n + 1) allow. `start` is the first point,
    `floor` the smallest legal value of a variable, and `deflection` the share of the previous direction
    that a step keeps.
    """

    penalties: FloatArray
    evaluate: Callable[[FloatArray], Point]
    start: FloatArray
    floor: float
    deflection: float


def relax(
    problem: SelectionProblem, oracle: ClientOracle, slopes: FloatArray, penalties: FloatArray
) -> Relaxation:
    """Return the relaxation with the fewest variables among those with the best bound.

    The start follows from `slopes` (L,), the slope of the penalty at good counts. `penalties`
    (L, n + 1) are those of `penalties_of`; a value of ``-inf`` excludes selections with that count.
    """
    if oracle.room is None:
        return _relax_copies(problem, oracle, slopes, penalties)
    return _relax_budgets(problem, oracle.room, slopes, penalties)


def _relax_budgets(
    problem: SelectionProblem, room: FloatArray, slopes: FloatArray, penalties: FloatArray
) -> Relaxation:
    """Return the bound as a function of one multiplier for each budget, shape (n,), and a start."""
    taken = np.minimum(room, problem.layers).astype(int)

    def evaluate(multipliers: FloatArray) -> Point:
        prices = problem.values - multipliers[:, None]
        total, masks = _layer_part(problem, prices, penalties)
        gradient = room - masks.sum(axis=1)
        # A multiplier at its floor cannot fall further.
        gradient = np.where((multipliers <= 0) & (gradient > 0), 0.0, gradient)
        return Point(total + float(multipliers @ taken), masks, None, gradient)

    # A client's multiplier lies between the last score that it affords and the first that it does not.
    scores = -np.sort(-(problem.values + slopes), axis=1)
    rows = np.arange(problem.clients)
    inside = scores[rows, np.maximum(taken - 1, 0)]
    outside = np.where(
        taken < problem.layers, scores[rows, np.minimum(taken, problem.layers - 1)], 0
    )
    start = np.maximum(0.0, (inside + np.maximum(outside, 0.0)) / 2)
    return Relaxation(penalties, evaluate, start, floor=0.0, deflection=0.0)


def _relax_copies(
    problem: SelectionProblem, oracle: ClientOracle, slopes: FloatArray, penalties: FloatArray
) -> Relaxation:
    """Return the bound as a function of the prices, shape (n, L), and a start for them."""

    def evaluate(prices: FloatArray) -> Point:
        total, masks = _layer_part(problem, prices, penalties)
        rest = problem.values - prices
        picks = oracle.best(rest)
        gradient = masks.astype(np.float64) - picks
        return Point(total + float(rest[picks].sum()), masks, picks, gradient)

    # With this start the clients see the scores of their last answer, and layers the negated slope.
    start = np.broadcast_to(-slopes, problem.values.shape).copy()
    return Relaxation(penalties, evaluate, start, floor=-np.inf, deflection=DEFLECTION)


def _layer_part(
    problem: SelectionProblem, prices: FloatArray, penalties: FloatArray
) -> tuple[float, BoolArray]:
    """Return the value and masks (n, L) of the layers' best sets of clients at `prices` (n, L)."""
    # A finite number in place of -inf keeps sums over several unaffordable layers comparable.
    excluded = -1e6 * (problem.magnitude + 1.0)
    by_layer = np.ascontiguousarray(np.where(problem.affordable, prices, excluded).T)
    ranked = -np.sort(-by_layer, axis=1)
    totals = penalties.copy()
    totals[:, 1:] += np.cumsum(ranked, axis=1)
    counts = totals.argmax(axis=1)
    value = float(np.take_along_axis(totals, counts[:, None], axis=1).sum())
    return value, largest(by_layer, ranked, counts).T


@dataclass(frozen=True, eq=False)
class Descent:
    """The end of a descent in a relaxation: the best variables, and the bound there.

    `counts` and `penalties` (L,) are running averages over the steps: of the number of clients that the
    layer part gives each layer, and of the penalty f there. Averages of subgradient steps approach a
    solution of the linear program whose dual is the bound (Larsson, Patriksson & Strömberg, *Ergodic,
    primal convergence in dual subgradient schemes*, 1999). So a difference between `penalties` and f at
    `counts` shows the layers on which that program mixes selections.
    """

    relaxation: Relaxation
    variables: FloatArray
    bound: float
    counts: FloatArray
    penalties: FloatArray


def descend(
    problem: SelectionProblem,
    search: PrimalSearch,
    relaxation: Relaxation,
    steps: int,
    margin: float = 0.0,
) -> Descent:
    """Minimise the bound until it meets the incumbent, stalls, or time or `steps` run out.

    `search` gets the masks met on the way, and has the incumbent and the deadline. With a `margin` the
    target is that far below the incumbent: a bound there shows that no covered selection is as good. If
    the target cannot be reached, the descent ends once the gap is closed and stays closed.
    """
    variables = best_variables = relaxation.start
    direction = np.zeros_like(variables)
    best: Point | None = None
    counts = penalties = np.zeros(problem.layers)
    length, waited, before = 1.0, 0, np.inf
    for step in range(steps):
        point = relaxation.evaluate(variables)
        progress = best is None or point.bound < best.bound - 1e-7 * abs(best.bound)
        waited = 0 if progress else waited + 1
        if best is None or point.bound < best.bound:
            best, best_variables = point, variables
        taken = point.layer_masks.sum(axis=0)
        share = NEWEST if step else 1.0
        counts = counts + share * (taken - counts)
        penalties = penalties + share * (problem.penalties[taken] - penalties)
        if step % 10 == 0 or (step < 20 and progress):
            _settle_from(search, point)
        target = search.objective - margin
        if best.bound <= target or search.late:
            break
        if step % STALL == 0:
            left = best.bound - target
            if left > (1.0 - STALL_SHARE) * before:
                break
            before = left
        closed = problem.relative_gap(search.objective, best.bound) <= CLOSED
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
    assert best is not None
    return Descent(relaxation, best_variables, best.bound, counts, penalties)


def _settle_from(search: PrimalSearch, point: Point) -> None:
    """Repair the masks of both parts of the relaxation."""
    search.settle(point.layer_masks.sum(axis=0))
    if point.client_masks is not None:
        search.settle(point.client_masks.sum(axis=0))
