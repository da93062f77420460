"""λ on a scale that does not depend on the model or the loss."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from layerfed.selection.oracle import ClientOracle
from layerfed.selection.problem import SelectionProblem


def scale_consistency(
    values: ArrayLike,
    costs: ArrayLike,
    budgets: ArrayLike,
    relative: float,
    depth_costs: ArrayLike | None = None,
) -> float:
    r"""Turn a scale-free λ into the raw λ of (P1).

    .. math:: \lambda = \lambda_\text{relative} \, \bar g / n

    where :math:`\bar g` is the mean value over all picks that the clients make on their own (the
    optimum at λ = 0). A client that leaves a choice shared by all others pays λ (n - 1), so at a
    relative λ of 1 dissent costs about one average layer's gain, whatever the gradients' scale
    and the number of clients.

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
    picks = ClientOracle(problem).best(problem.values)
    if not picks.any():
        return 0.0
    return float(relative * problem.values[picks].mean() / problem.clients)
