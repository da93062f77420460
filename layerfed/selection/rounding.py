"""Measured costs on a grid: a selection problem that is solved fast and spends no budget too far.

Seconds and bytes measured on a device differ a little by client and layer, and a knapsack of
arbitrary real costs has no structure to use. Whole numbers of small units have: see
:mod:`layerfed.selection.knapsack`.
"""

from __future__ import annotations

import numpy as np

from layerfed.selection.knapsack import MOST_CELLS, Grid
from layerfed.selection.oracle import ENUMERATION_LAYERS
from layerfed.selection.problem import SelectionProblem


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
    return (
        SelectionProblem(
            problem.values,
            _in_units(costs, unit, cells),
            np.where(budgets > 0, cells, 0.0),
            problem.consistency,
            _in_units(depth, unit, cells),
        ),
        taken,
    )


def _in_units(costs: np.ndarray, unit: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Costs (n, L) in units (n,), rounded up; what exceeds the budget exceeds it by one unit."""
    # A multiple of the unit may come out a rounding error above it.
    units = np.ceil(costs / unit[:, None] - 1e-9)
    return np.asarray(np.minimum(units, cells[:, None] + 1))
