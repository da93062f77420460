"""Preparation of an instance: a scale for λ, a limit on outlying clients, and costs on a grid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from layerfed.selection.knapsack import ENUMERATION_LAYERS, MOST_CELLS, ClientOracle, Grid
from layerfed.selection.problem import BUDGET_TOLERANCE, FloatArray, SelectionProblem

#: For the scale, a client's mean gain counts as at most this multiple of the median client's.
MOST_FOR_SCALE = 3.0

#: A client's mean gain is scaled down to at most this multiple of the median client's.
MOST_WEIGHT = 1e3


def mean_gain(problem: SelectionProblem) -> float:
    r"""Return the unit of a relative λ: the mean gain over all picks that the clients make on their own.

    The raw λ of (P1) is

    .. math:: \lambda = \lambda_\text{relative} \, \bar g / n

    with :math:`\bar g` this mean, at the optimum for λ = 0. A client that leaves a choice of all others
    pays λ (n - 1). So at a relative λ of 1 dissent costs about the gain of an average layer, for any
    scale of gradients and any number of clients.

    Clients claim their own gains. So no client's mean gain counts as more than `MOST_FOR_SCALE` times
    the median client's, over clients that pick anything. If all are below that limit, :math:`\bar g` is
    the plain mean. Otherwise fewer than half of the clients cannot push it above `MOST_FOR_SCALE` times
    the others' claims: if these are alike, one client of n changes λ by a factor below
    ``1 + MOST_FOR_SCALE / (n - 1)``.
    """
    gains, picks = _own_gains(problem)
    if not picks.any():
        return 0.0
    counted = np.minimum(gains, MOST_FOR_SCALE * _median(gains[picks > 0]))
    return float(np.average(counted, weights=picks))


def forgive_richer(problem: SelectionProblem) -> SelectionProblem:
    r"""Charge a client for disagreeing within what it can afford, and not for having more.

    Of a pair of clients with different budgets, each layer costs 2 λ that only the poorer one has, and
    nothing that only the richer one has. The cost of a pair is thus zero if the poorer one's layers are
    among the richer one's. Pairs with equal budgets are charged as in (P1). In formulas, with
    :math:`b_i` the clients richer than i less those poorer,

    .. math:: 2 (m_i - m_j)_+ = |m_i - m_j| + m_i - m_j
        \quad\Rightarrow\quad
        \lambda \sum_{i<j} \ldots = \lambda \sum_{i<j} \lVert m_i - m_j \rVert_1
        + \lambda \sum_{i,l} b_i m_{il}

    so that the result is (P1) with other gains. A client's wealth is its budget relative to the cost of
    all its layers, which compares devices whose costs are measured.

    Parameters
    ----------
    problem : SelectionProblem
        With λ set.

    Returns
    -------
    SelectionProblem
        The problem with the penalty in its gains. A large λ is lowered to one that already rules out
        every avoidable disagreement.
    """
    total = problem.cost_matrix.sum(axis=1) + problem.depth_matrix.max(axis=1, initial=0.0)
    wealth = problem.budgets / np.where(total > 0, total, 1.0)
    richer = wealth[None, :] > wealth[:, None] * (1.0 + BUDGET_TOLERANCE)
    balance = richer.sum(axis=1) - richer.sum(axis=0)
    lam = min(problem.consistency, float(np.abs(problem.values).sum()) + 1e-300)
    return replace(problem, consistency=lam, values=problem.values - lam * balance[:, None])


def charge_switching(
    problem: SelectionProblem, last: FloatArray, cost: float
) -> tuple[SelectionProblem, float]:
    r"""Charge each client for the layers in which its mask differs from the last selection.

    .. math:: c \sum_{i,l} |m_{il} - p_{il}| = c \sum_{i,l} p_{il} + c \sum_{i,l} (1 - 2 p_{il}) m_{il}

    for masks of 0 and 1, so that the result is (P1) with other gains.

    Parameters
    ----------
    problem : SelectionProblem
    last : array of shape (n, L)
        p: 1 for a layer of the client's last selection; for a client without one, the share of the last
        cohort that had the layer.
    cost : float
        c, in the unit of the gains.

    Returns
    -------
    problem : SelectionProblem
    constant : float
        What the charge adds whatever is selected.
    """
    values = problem.values - cost * (1.0 - 2.0 * last)
    return replace(problem, values=values), cost * float(last.sum())


def limit_weights(problem: SelectionProblem) -> tuple[SelectionProblem, FloatArray]:
    """Scale down the gains of clients that outweigh all others.

    (P1) adds gains, and a solver's tolerance is relative to their sum. If one client claims 1e12 times
    the others' gains, theirs are rounding errors and their masks arbitrary. So a client whose mean gain
    over its own picks exceeds `MOST_WEIGHT` times the median client's is scaled down to that. The order
    of its layers and its picks at λ = 0 stay the same.

    Parameters
    ----------
    problem : SelectionProblem
        The instance.

    Returns
    -------
    problem : SelectionProblem
        The same object if there is no outlier.
    weights : array of shape (n,)
        The factor of each client's gains, 1 for all but outliers.
    """
    gains, picks = _own_gains(problem)
    weights = np.ones(problem.clients)
    if not picks.any():
        return problem, weights
    limit = MOST_WEIGHT * _median(gains[picks > 0])
    outliers = gains > limit
    if not outliers.any():
        return problem, weights
    weights[outliers] = limit / gains[outliers]
    return replace(problem, values=problem.values * weights[:, None]), weights


def _own_gains(problem: SelectionProblem) -> tuple[FloatArray, FloatArray]:
    """Return the mean gain of each client's own picks (0 without any), and their number; (n,) each."""
    chosen = ClientOracle(problem).best(problem.values)
    picks = chosen.sum(axis=1).astype(np.float64)
    # Dividing first keeps the sum of huge claims finite.
    shares = problem.values / np.maximum(picks, 1.0)[:, None]
    return np.where(chosen, shares, 0.0).sum(axis=1), picks


def _median(gains: FloatArray) -> float:
    """Return the lower median: of two clients, the one that claims less sets the scale."""
    return float(np.sort(gains)[(len(gains) - 1) // 2])


def round_costs(problem: SelectionProblem, share: float) -> tuple[SelectionProblem, float]:
    r"""Round costs up to a grid of each client's own, if they lie on none.

    A client with room for at most K layers gets the unit :math:`u_i = s R_i / (K + 1)`, with s the
    `share`. Costs and depth costs are rounded up to multiples of the unit, so masks within the rounded
    costs are within the true ones. Each of K layers and one depth cost grow by less than a unit. So
    every selection that spends at most :math:`(1 - s) R_i` stays allowed; a selection that fills a
    budget closer than that may be lost. Objective, bound and gap of the rounded problem therefore hold
    against every selection that leaves a share s of each budget unspent.

    Parameters
    ----------
    problem : SelectionProblem
        The instance.
    share : float
        Largest share of a budget that rounding may take, in [0, 1); 0 keeps costs exact.

    Returns
    -------
    problem : SelectionProblem
        The problem with costs, depth costs and budgets in units. It is the same object if nothing is
        rounded: for equal costs, few layers, or costs on a grid.
    share : float
        The largest share of a budget that rounding took; 0 if nothing was rounded.

    Raises
    ------
    ValueError
        If `share` is out of range.
    """
    if not 0 <= share < 1:
        raise ValueError(
            f"the share of a budget that rounding may take is {share}; expected a number in [0, 1)"
        )
    costs, depth, budgets = problem.cost_matrix, problem.depth_matrix, problem.budgets
    equal = bool(np.all(costs == costs[:, :1]))
    small = problem.layers <= ENUMERATION_LAYERS or problem.clients == 0
    if share == 0 or equal or small or Grid.of(problem) is not None:
        return problem, 0.0
    cheapest = np.cumsum(np.sort(costs, axis=1), axis=1)
    most = (cheapest <= problem.limits[:, None]).sum(axis=1)
    # Rounded up, so that a budget is a whole number of units.
    cells = np.minimum(np.ceil((most + 1) / share), MOST_CELLS)
    # A budget whose unit would be below the smallest normal number affords nothing.
    budgets = np.where(budgets < cells * np.finfo(np.float64).tiny, 0.0, budgets)
    unit = np.where(budgets > 0, budgets, 1.0) / cells
    taken = float(((most + 1) / cells).max())
    # Dividing may put a multiple of the unit a rounding error above it. Unaffordable costs stay so.
    costs, depth = (
        np.minimum(np.ceil(each / unit[:, None] - 1e-9), cells[:, None] + 1)
        for each in (costs, depth)
    )
    budgets = np.where(budgets > 0, cells, 0.0)
    return replace(problem, costs=costs, budgets=budgets, depth_costs=depth), taken
