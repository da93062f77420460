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

The masks of both parts feed :class:`~layerfed.selection.search.PrimalSearch`. Where a gap stays,
:mod:`~layerfed.selection.branching` splits the problem by counts. At the end, forcing a single pick
in or out of the two parts bounds every selection with that pick; what falls below the incumbent is
fixed, and only the rest is left for the integer program (reduced-cost fixing).
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from layerfed.selection.branching import Part, branch
from layerfed.selection.descent import descend
from layerfed.selection.oracle import ClientOracle
from layerfed.selection.problem import PROVEN, BoolArray, Selection, SelectionProblem
from layerfed.selection.reduction import Reduction, reduce_problem, union
from layerfed.selection.relaxation import CountRange, Point, relax
from layerfed.selection.search import PrimalSearch

#: Steps of the first descent; instances that it closes are closed within a few dozen.
MAX_STEPS = 600

#: Steps for telling a unique optimum from a tie: a refinement, not worth a round's time.
INTERIOR_STEPS = 150

#: Asking for a gap up to this asks for a proof (`PROVEN`), with which the masks no longer depend
#: on the solver.
PROOF_ASKED = 1e-6

#: Share of the time limit local search may take when the first descent leaves a gap.
SEARCH_SHARE = 0.1

#: Share of the time limit kept for deciding single picks by their bound, and the number of parts up
#: to which that is tried: with many open, hardly a pick is decided in all of them.
FIXING_SHARE = 0.05
MOST_PARTS = 16

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
    search = PrimalSearch(working, oracle, deadline - FIXING_SHARE * time_limit)
    if incumbent is not None:
        search.offer(incumbent)
    if working.clients == 0:
        empty = Selection.certified(problem, search.masks, 0.0, "lagrangian", 0.0)
        return empty, Reduction.none(problem)
    search.settle(np.zeros(working.layers))
    search.settle(oracle.best(working.values).sum(axis=0))
    parts = _bound(working, oracle, search, time_limit, gap)
    bound = parts[0].bound
    seconds = time.perf_counter() - started
    selection = Selection.certified(problem, search.masks, bound, "lagrangian", seconds)
    if len(parts) > MOST_PARTS:
        return selection, replace(Reduction.none(working), bound=bound)
    search.deadline = min(deadline, time.perf_counter() + FIXING_SHARE * time_limit)
    reduction = union([_reduce(working, oracle, search, part) for part in parts])
    return selection, reduction


def _bound(
    problem: SelectionProblem,
    oracle: ClientOracle,
    search: PrimalSearch,
    time_limit: float,
    gap: float,
) -> list[Part]:
    """Bound all selections as good as the incumbent, which improves on the way."""
    counts = CountRange.whole(problem)
    relaxation = relax(problem, oracle, search.slopes(search.masks.sum(axis=0)), counts)
    descent = descend(problem, search, relaxation, MAX_STEPS)
    parts = [Part(counts, descent)]
    enough = gap if gap > PROOF_ASKED else PROVEN
    if problem.relative_gap(search.objective, descent.bound) <= enough:
        return parts
    parts = branch(problem, oracle, search, parts)
    bound = parts[0].bound
    if problem.relative_gap(search.objective, bound) <= enough:
        return parts
    before = search.objective
    target = bound * (1.0 - enough * np.sign(bound))
    search.intensify(time.perf_counter() + SEARCH_SHARE * time_limit, target)
    return branch(problem, oracle, search, parts) if search.objective > before else parts


def _reduce(
    problem: SelectionProblem,
    oracle: ClientOracle,
    search: PrimalSearch,
    part: Part,
) -> Reduction:
    """Say what one part's bound decides about its selections."""
    points, deadline = part.descent.points, search.deadline
    if search.late:
        return replace(Reduction.none(problem), bound=part.bound)
    reduction = reduce_problem(problem, oracle, search.objective, points, deadline)
    proven = problem.relative_gap(search.objective, part.bound) <= PROVEN
    if proven and len(reduction.free) and not search.late:
        inner = _interior_point(problem, oracle, search, part)
        points = [inner, *points]
        reduction = reduce_problem(problem, oracle, search.objective, points, deadline)
    return reduction


def _interior_point(
    problem: SelectionProblem, oracle: ClientOracle, search: PrimalSearch, part: Part
) -> Point:
    """Evaluate the bound where it decides as many picks as possible about the incumbent.

    Polyak's step lands on the edge of the set of optimal variables, where picks look tied that
    are not. So every pick of the incumbent is handicapped a little and every other one favoured.
    If it stays optimal, no other selection comes close, and the variables that prove it lie well
    inside.
    """
    handicap = HANDICAP * problem.magnitude / problem.values.size
    shift = np.where(search.masks, -handicap, handicap)
    harder = replace(problem, values=problem.values + shift)
    rival = PrimalSearch(harder, oracle, search.deadline)
    rival.offer(search.masks)
    slopes = search.slopes(search.masks.sum(axis=0))
    start = replace(relax(harder, oracle, slopes, part.counts), start=part.descent.variables)
    inner = descend(harder, rival, start, INTERIOR_STEPS)
    return relax(problem, oracle, slopes, part.counts).evaluate(inner.variables)
