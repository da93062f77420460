r"""(P1) by Lagrangian decomposition: certified bounds and good masks in milliseconds.

Derivation
----------
Write (P1) with the penalty as a function f of the counts (see :class:`SelectionProblem`), and
give every pick two copies: ``m`` for the layers, where the counts are, and ``x`` for the clients,
where the budgets are. Relaxing ``m = x`` with prices ``u`` of shape (n, L) splits the problem:

.. math::

    B(u) = \sum_l \max_{m_{\cdot l}} \Big[\sum_i u_{il} m_{il} + f\big(\sum_i m_{il}\big)\Big]
         + \sum_i \max_{x_i\ \text{affordable}} \sum_l (v_{il} - u_{il})\, x_{il}
         \;\ge\; \text{(P1)}

for every ``u`` (weak duality; Guignard & Kim, *Lagrangean decomposition*, 1987).

- *Layer part.* For a fixed count k the best set is the k clients with the largest prices: sort,
  cumulate, add f(k), take the best k. Exact for any f of the count, convex or concave.
- *Client part.* A knapsack per client, solved exactly, depth costs included, by
  :class:`~layerfed.selection.oracle.ClientOracle`.

With equal costs and no depth costs the knapsack polytope is integral, so nothing is lost by
restricting to ``u_il = v_il - μ_i c_il`` with one multiplier ``μ_i >= 0`` per budget: n instead of
n L prices, and the client part becomes ``μ_i R_i``. This is the classic relaxation of the budgets.

B is convex and piecewise linear. Its subgradient is ``m - x`` for the prices, and
``R_i - sum_l c_il m_il`` for the multipliers. Steps have Polyak's length (*Introduction to
Optimization*, 1987), ``θ (B(u) - objective of the incumbent) / |g|²``: where bound and incumbent
meet, the target is exact and the steps converge linearly. For the prices, steps follow the
subgradient deflected by the previous direction (Camerini, Fratta & Maffioli, 1975).

The masks of both parts feed :class:`~layerfed.selection.search.PrimalSearch`. At the end, forcing
a single pick in or out of the two parts bounds every selection with that pick; what falls below
the incumbent is fixed, and only the rest is left for the integer program (reduced-cost fixing).
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from layerfed.selection.oracle import ClientOracle
from layerfed.selection.problem import (
    PROVEN,
    BoolArray,
    FloatArray,
    Selection,
    SelectionProblem,
)
from layerfed.selection.reduction import Reduction, reduce_problem
from layerfed.selection.relaxation import Point, Relaxation, relax
from layerfed.selection.search import PrimalSearch

#: Subgradient steps before giving up; instances that close do so within a few dozen.
MAX_STEPS = 600

#: Steps for telling a unique optimum from a tie: a refinement, not worth a round's time.
INTERIOR_STEPS = 150

#: Relative gap at which a descent is done.
CLOSED = 1e-10

#: Steps without progress before the step length shrinks, and by how much.
PATIENCE = 12
SHRINK = 0.7

#: Share of the time limit local search may take when the first descent leaves a gap.
SEARCH_SHARE = 0.3

#: Size of the handicap that tells a unique optimum from a tie, as a share of the mean gain.
HANDICAP = 1e-6


def solve_lagrangian(
    problem: SelectionProblem, *, time_limit: float = 10.0, gap: float = 1e-6
) -> Selection:
    """Solve (P1) by Lagrangian decomposition and local search.

    Parameters
    ----------
    problem : SelectionProblem
        The instance.
    time_limit : float
        Seconds.
    gap : float
        Local search stops once the relative gap is at most this.

    Returns
    -------
    Selection
        Feasible masks with a valid bound. The gap may stay positive: unlike the integer program
        this method cannot always close it.
    """
    return certify(problem, time_limit=time_limit, gap=gap)[0]


def certify(
    problem: SelectionProblem,
    *,
    time_limit: float,
    gap: float,
    incumbent: BoolArray | None = None,
) -> tuple[Selection, Reduction]:
    """Like `solve_lagrangian`, and say what the bound decides about every selection as good.

    Parameters
    ----------
    problem, time_limit, gap
        As in `solve_lagrangian`.
    incumbent : array of bool, shape (n, L), optional
        Feasible masks to start from. The result is never worse.
    """
    started = time.perf_counter()
    deadline = started + time_limit
    working = problem.saturated()
    oracle = ClientOracle(working)
    search = PrimalSearch(working, oracle)
    if incumbent is not None:
        search.offer(incumbent)
    if working.clients == 0:
        empty = Selection.certified(problem, search.masks, 0.0, "lagrangian", 0.0)
        return empty, Reduction.none(problem)
    search.settle(np.zeros(working.layers))
    search.settle(oracle.best(working.values).sum(axis=0))
    slopes = search.slopes(search.masks.sum(axis=0))
    relaxation = relax(working, oracle, slopes)
    variables, points = _descend(working, search, relaxation, deadline)
    if working.relative_gap(search.objective, points[-1].bound) > gap:
        target = points[-1].bound * (1.0 - gap * np.sign(points[-1].bound))
        pause = time.perf_counter() + SEARCH_SHARE * time_limit
        search.intensify(min(deadline, pause), target)
        again = replace(relaxation, start=variables)
        variables, more = _descend(working, search, again, deadline)
        points = sorted([*points, *more], key=lambda point: -point.bound)
    selection = Selection.certified(
        problem,
        search.masks,
        points[-1].bound,
        "lagrangian",
        time.perf_counter() - started,
    )
    reduction = reduce_problem(working, oracle, search.objective, points)
    if selection.gap <= PROVEN and len(reduction.free):
        inner = _interior_point(working, oracle, search.masks, variables, deadline)
        reduction = reduce_problem(working, oracle, search.objective, [inner, *points])
    return selection, reduction


def _descend(
    problem: SelectionProblem,
    search: PrimalSearch,
    relaxation: Relaxation,
    deadline: float,
    steps: int = MAX_STEPS,
) -> tuple[FloatArray, list[Point]]:
    """Minimise the bound; returns the best variables and the last improving points."""
    variables = best_variables = relaxation.start
    direction = np.zeros_like(variables)
    best: list[Point] = []
    length, waited = 1.0, 0
    for step in range(steps):
        point = relaxation.evaluate(variables)
        progress = not best or point.bound < best[-1].bound - 1e-7 * abs(best[-1].bound)
        waited = 0 if progress else waited + 1
        if not best or point.bound < best[-1].bound:
            best, best_variables = [*best[-2:], point], variables
        if step % 10 == 0 or (step < 20 and progress):
            _settle_from(search, point)
        if problem.relative_gap(search.objective, best[-1].bound) <= CLOSED:
            break
        if time.perf_counter() > deadline:
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
        size = length * (point.bound - search.objective) / square
        variables = np.maximum(variables - size * direction, relaxation.floor)
    return best_variables, best


def _settle_from(search: PrimalSearch, point: Point) -> None:
    """Repair what the two parts of the relaxation propose."""
    search.settle(point.layer_masks.sum(axis=0))
    if point.client_masks is not None:
        search.settle(point.client_masks.sum(axis=0))


def _interior_point(
    problem: SelectionProblem,
    oracle: ClientOracle,
    masks: BoolArray,
    variables: FloatArray,
    deadline: float,
) -> Point:
    """Evaluate the bound where it decides as many picks as possible about optimal `masks`.

    Polyak's step lands on the edge of the set of optimal variables, where picks look tied that
    are not. So every pick of `masks` is handicapped a little and every other one favoured. If
    `masks` stay optimal, no other selection comes close, and the variables that prove it lie
    well inside.
    """
    handicap = HANDICAP * problem.magnitude / problem.values.size
    harder = replace(problem, values=problem.values + np.where(masks, -handicap, handicap))
    search = PrimalSearch(harder, oracle)
    search.offer(masks)
    slopes = search.slopes(masks.sum(axis=0))
    start = replace(relax(harder, oracle, slopes), start=variables)
    inner, _ = _descend(harder, search, start, deadline, INTERIOR_STEPS)
    return relax(problem, oracle, slopes).evaluate(inner)
