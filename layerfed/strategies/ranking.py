"""Functions that fill a budget from a ranking of layers, used by all strategies but `ilp` and `full`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from layerfed.config.seeding import Stream, generator
from layerfed.runs.records import Choice
from layerfed.server.candidates import Candidates

__all__ = ["affordable", "by_order", "by_score", "prefix", "skip_fill"]

# Sums of costs have rounding errors; a budget of 0.3 must afford costs of 0.1 and 0.2.
SLACK = 1 + 1e-9


def prefix(
    order: Iterable[int], costs: np.ndarray, budget: float, depth: np.ndarray | None = None
) -> np.ndarray:
    """Take layers in order, up to the first that does not fit; return a mask of shape (L,).

    Parameters
    ----------
    order : Iterable[int]
        Layers, best first.
    costs : numpy.ndarray
        c_l, shape (L,).
    budget : float
        R_i.
    depth : numpy.ndarray, optional
        D_l, shape (L,): the extra cost if l is the lowest layer.
    """
    return _fill(order, costs, budget, depth, passing=False)


def skip_fill(
    order: Iterable[int], costs: np.ndarray, budget: float, depth: np.ndarray | None = None
) -> np.ndarray:
    """Take layers in order, like `prefix`, but skip layers that do not fit and go on."""
    return _fill(order, costs, budget, depth, passing=True)


def _fill(
    order: Iterable[int],
    costs: np.ndarray,
    budget: float,
    depth: np.ndarray | None,
    *,
    passing: bool,
) -> np.ndarray:
    mask, spent, lowest = np.zeros(len(costs), dtype=bool), 0.0, len(costs)
    for layer in order:
        own, low = spent + costs[layer], min(lowest, layer)
        if own + (0.0 if depth is None else depth[low]) <= budget * SLACK:
            spent, lowest = own, low
            mask[layer] = True
        elif not passing:
            break
    return mask


def by_order(candidates: Candidates, order: Sequence[int]) -> Choice:
    """Give each client the first layers of a common order, up to the first that does not fit.

    Blocks that a client skips are passed over.
    """
    rows = zip(
        candidates.runs, candidates.costs, candidates.budgets, candidates.depth_costs, strict=True
    )
    return Choice(np.stack([prefix([x for x in order if on[x]], *rest) for on, *rest in rows]))


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
    rows = zip(orders, candidates.costs, candidates.budgets, candidates.depth_costs, strict=True)
    return Choice(np.stack([skip_fill(order, c, r, d) for order, c, r, d in rows]))


def affordable(candidates: Candidates) -> Choice:
    """Give each client all layers, and ignore the run's budget.

    A node's own budget is respected: the client gets as many layers as fit, drawn again in each round.
    """
    masks = np.ones(candidates.costs.shape, dtype=bool)
    for row in np.flatnonzero(np.isfinite(candidates.limits)).tolist():
        client, costs = candidates.clients[row], candidates.costs[row]
        rng = generator(candidates.seed, Stream.MASK, candidates.round, client)
        masks[row] = skip_fill(
            rng.permutation(len(costs)), costs, candidates.limits[row], candidates.depth_costs[row]
        )
    return Choice(masks)
