"""What is done to an instance before it is solved: λ on a scale, no giant client, costs on a grid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from layerfed.selection.knapsack import ENUMERATION_LAYERS, MOST_CELLS, ClientOracle, Grid
from layerfed.selection.problem import FloatArray, SelectionProblem

#: A client's mean gain counts for the scale up to this many times the median client's.
MOST_FOR_SCALE = 3.0

#: A client whose mean gain is more than this many times the median client's is scaled down to it.
MOST_WEIGHT = 1e3


def scale_consistency(
    values: ArrayLike,
    costs: ArrayLike,
    budgets: ArrayLike,
    relative: float,
    depth_costs: ArrayLike | None = None,
) -> float:
    r"""Turn a scale-free λ into the raw λ of (P1).

    .. math:: \lambda = \lambda_\text{relative} \, \bar g / n

    where :math:`\bar g` is the mean gain over all picks that the clients make on their own (the
    optimum at λ = 0). A client that leaves a choice shared by all others pays λ (n - 1), so at a
    relative λ of 1 dissent costs about one average layer's gain, whatever the gradients' scale
    and the number of clients.

    Gains are what clients claim, so no client's mean gain counts for more than `MOST_FOR_SCALE`
    times the median client's (the lower one of two in the middle; clients that pick nothing left
    out). Where all are below that, :math:`\bar g` is the plain mean. Else it stays within
    `MOST_FOR_SCALE` times the median, which fewer than half of the clients cannot push above
    what the others claim: one client of n that claims any number moves λ by a factor below
    ``1 + MOST_FOR_SCALE / (n - 1)`` where the others' gains are alike.

    Parameters
    ----------
    values, costs, budgets, depth_costs
        As in :class:`SelectionProblem`.
    relative : float
        Scale-free λ, any sign.

    Returns
    -------
    float
        Raw λ in the unit of `values`; 0 if no client picks anything on its own.
    """
    problem = SelectionProblem(
        np.asarray(values, dtype=np.float64),
        np.asarray(costs, dtype=np.float64),
        np.asarray(budgets, dtype=np.float64),
        0.0,
        None if depth_costs is None else np.asarray(depth_costs, dtype=np.float64),
    )
    if not np.isfinite(relative):
        raise ValueError(f"the relative consistency is {relative}; expected a finite number")
    gains, picks = _own_gains(problem)
    if not picks.any():
        return 0.0
    counted = np.minimum(gains, MOST_FOR_SCALE * _median(gains[picks > 0]))
    return float(relative * np.average(counted, weights=picks) / problem.clients)


def limit_weights(problem: SelectionProblem) -> tuple[SelectionProblem, FloatArray]:
    """Scale down the gains of clients that outweigh all others.

    (P1) adds up gains, and a solver's tolerance is relative to their sum: next to a client that
    claims 1e12 times the others' gains, theirs are rounding errors, and their masks arbitrary. A
    client whose mean gain over its own picks exceeds `MOST_WEIGHT` times the median client's is
    scaled down to that. The order of its layers stays, and so do its picks at λ = 0.

    Parameters
    ----------
    problem : SelectionProblem
        The instance.

    Returns
    -------
    problem : SelectionProblem
        The same object where no client is that far off.
    weights : array of shape (n,)
        What each client's gains were multiplied by, 1 for all but outliers.
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
    """Mean gain of each client's own picks (0 if it has none), and their number; (n,) each."""
    chosen = ClientOracle(problem).best(problem.values)
    picks = chosen.sum(axis=1).astype(np.float64)
    # Dividing first keeps the sum of huge claims finite.
    shares = problem.values / np.maximum(picks, 1.0)[:, None]
    return np.where(chosen, shares, 0.0).sum(axis=1), picks


def _median(gains: FloatArray) -> float:
    """Lower median: of two clients that disagree, the one that claims less sets the scale."""
    return float(np.sort(gains)[(len(gains) - 1) // 2])


def round_costs(problem: SelectionProblem, share: float) -> tuple[SelectionProblem, float]:
    r"""Round costs up to a grid of each client's own, where they stand on none.

    A client that has room for at most K layers gets the unit
    :math:`u_i = s R_i / (K + 1)`, with s the `share`. Costs and depth costs are rounded up to
    multiples of it, so whoever keeps to the rounded costs keeps to the true ones. What is lost:
    each of K layers and one depth cost grow by less than a unit, so every selection that spends
    at most :math:`(1 - s) R_i` stays allowed, while one that fills a budget closer than that may
    not. Objective, bound and gap of the rounded problem are therefore certified against every
    selection that leaves a share s of each budget unspent.

    Parameters
    ----------
    problem : SelectionProblem
        The instance.
    share : float
        Largest share of a budget that rounding may take, in [0, 1); 0 keeps costs exact.

    Returns
    -------
    problem : SelectionProblem
        With costs, depth costs and budgets counted in units; the same object where nothing had to
        be rounded (equal costs, few layers, or a grid already).
    share : float
        The share that may have been taken: 0 where nothing was rounded.

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
    # Rounded up, so that the units of a budget are a whole number of them.
    cells = np.minimum(np.ceil((most + 1) / share), MOST_CELLS)
    unit = np.where(budgets > 0, budgets, 1.0) / cells
    taken = float(((most + 1) / cells).max())
    # A multiple of the unit may come out a rounding error above it; what is too dear stays so.
    costs, depth = (
        np.minimum(np.ceil(each / unit[:, None] - 1e-9), cells[:, None] + 1)
        for each in (costs, depth)
    )
    budgets = np.where(budgets > 0, cells, 0.0)
    return replace(problem, costs=costs, budgets=budgets, depth_costs=depth), taken
