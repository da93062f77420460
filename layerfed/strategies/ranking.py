"""Filling a budget from a ranking of layers: what all rule-based strategies share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from layerfed.config.seeding import Stream, generator
from layerfed.runs.records import Choice
from layerfed.server.candidates import Candidates

__all__ = ["affordable", "by_order", "by_score", "prefix", "skip_fill"]

# Sums of costs carry rounding errors; a budget of 0.3 affords costs of 0.1 and 0.2.
SLACK = 1 + 1e-9


def prefix(
    order: Iterable[int], costs: np.ndarray, budget: float, depth: np.ndarray | None = None
) -> np.ndarray:
    """Take layers in order up to the first that no longer fits; mask of shape (L,).

    Parameters
    ----------
    order : Iterable[int]
        Layers, best first.
    costs : numpy.ndarray
        c_l, shape (L,).
    budget : float
        R_i.
    depth : numpy.ndarray, optional
        D_l, shape (L,): what it costs that l is the lowest layer.
    """
    return _fill(order, costs, budget, depth, passing=False)


def skip_fill(
    order: Iterable[int], costs: np.ndarray, budget: float, depth: np.ndarray | None = None
) -> np.ndarray:
    """Take layers in order, passing over those that no longer fit; otherwise like `prefix`."""
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
    """Give each client the first layers of one order, as many as fit."""
    rows = zip(candidates.costs, candidates.budgets, candidates.depth_costs, strict=True)
    return Choice(np.stack([prefix(order, c, r, d) for c, r, d in rows]))


def by_score(candidates: Candidates, scores: np.ndarray) -> Choice:
    """Give each client its highest-scored layers that fit; ties go to the layer nearer the output.

    That is the solvers' rule as well (:mod:`layerfed.selection.ties`): of equal layers the one
    nearer the output needs the shorter backward pass.

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
    """Give each client all layers, whatever the run's budget.

    A node that itself states less than they cost gets as many as fit that, drawn anew each round.
    """
    masks = np.ones(candidates.costs.shape, dtype=bool)
    for row in np.flatnonzero(np.isfinite(candidates.limits)).tolist():
        client, costs = candidates.clients[row], candidates.costs[row]
        rng = generator(candidates.seed, Stream.MASK, candidates.round, client)
        masks[row] = skip_fill(
            rng.permutation(len(costs)), costs, candidates.limits[row], candidates.depth_costs[row]
        )
    return Choice(masks)
