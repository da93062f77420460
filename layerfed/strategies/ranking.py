"""Functions that fill a budget from a ranking of layers, used by all strategies but `ilp` and `full`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from layerfed.config.seeding import Stream, generator
from layerfed.runs.records import Choice
from layerfed.server.candidates import Candidates

__all__ = ["affordable", "by_order", "by_orders", "by_score", "fill"]

# Sums of costs have rounding errors; a budget of 0.3 must afford costs of 0.1 and 0.2.
SLACK = 1 + 1e-9


def fill(
    order: Iterable[int],
    costs: np.ndarray,
    budget: float,
    depth: np.ndarray,
    *,
    passing: bool = True,
) -> np.ndarray:
    """Take layers in order while they fit; return a mask of shape (L,).

    Parameters
    ----------
    order : Iterable[int]
        Layers, best first.
    costs : numpy.ndarray
        c_l, shape (L,).
    budget : float
        R_i.
    depth : numpy.ndarray
        D_l, shape (L,): the extra cost if l is the lowest layer.
    passing : bool (default: True)
        Whether to pass over a layer that does not fit, and go on; else it is the end.
    """
    mask, spent, lowest = np.zeros(len(costs), dtype=bool), 0.0, len(costs)
    for layer in order:
        own, low = spent + costs[layer], min(lowest, layer)
        if own + depth[low] <= budget * SLACK:
            spent, lowest = own, low
            mask[layer] = True
        elif not passing:
            break
    return mask


def by_orders(
    candidates: Candidates, orders: Iterable[Iterable[int]], *, passing: bool = True
) -> Choice:
    """Fill each client's budget in its own order; `passing` as in `fill`."""
    rows = zip(orders, candidates.costs, candidates.budgets, candidates.depth_costs, strict=True)
    return Choice(np.stack([fill(*row, passing=passing) for row in rows]))


def by_order(candidates: Candidates, order: Sequence[int]) -> Choice:
    """Give each client the first layers of a common order, up to the first that does not fit.

    Blocks that a client skips are passed over.
    """
    orders = [[layer for layer in order if on[layer]] for on in candidates.runs]
    return by_orders(candidates, orders, passing=False)


def by_score(candidates: Candidates, scores: np.ndarray) -> Choice:
    """Give each client its layers with the highest scores that fit.

    Ties go to the layer nearer the output, which needs the shorter backward pass. The solvers have the
    same rule (:mod:`layerfed.selection.ties`).

    Parameters
    ----------
    scores : numpy.ndarray
        Shape (n, L), higher is better.
    """
    last = scores.shape[1] - 1
    orders = last - np.argsort(-scores[:, ::-1], axis=1, kind="stable")
    return by_orders(candidates, orders)


def affordable(candidates: Candidates) -> Choice:
    """Give each client all layers, and ignore the run's budget.

    A node's own budget is respected: the client gets as many layers as fit, drawn again in each round.
    """
    masks = np.ones(candidates.costs.shape, dtype=bool)
    for row in np.flatnonzero(np.isfinite(candidates.limits)).tolist():
        client, costs = candidates.clients[row], candidates.costs[row]
        rng = generator(candidates.seed, Stream.MASK, candidates.round, client)
        masks[row] = fill(
            rng.permutation(len(costs)), costs, candidates.limits[row], candidates.depth_costs[row]
        )
    return Choice(masks)
