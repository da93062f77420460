"""Filling a budget from a ranking of layers: what all rule-based strategies share."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from layerfed.records import Choice
from layerfed.strategies.base import Candidates

__all__ = ["by_score", "prefix", "skip_fill"]

# Sums of costs carry rounding errors; a budget of 0.3 affords costs of 0.1 and 0.2.
SLACK = 1 + 1e-9


def prefix(order: Iterable[int], costs: np.ndarray, budget: float) -> np.ndarray:
    """Take layers in order up to the first that no longer fits; mask of shape (L,)."""
    mask, spent = np.zeros(len(costs), dtype=bool), 0.0
    for layer in order:
        spent += costs[layer]
        if spent > budget * SLACK:
            break
        mask[layer] = True
    return mask


def skip_fill(order: Iterable[int], costs: np.ndarray, budget: float) -> np.ndarray:
    """Take layers in order, passing over those that no longer fit; mask of shape (L,)."""
    mask, spent = np.zeros(len(costs), dtype=bool), 0.0
    for layer in order:
        if spent + costs[layer] <= budget * SLACK:
            spent += costs[layer]
            mask[layer] = True
    return mask


def by_score(candidates: Candidates, scores: np.ndarray) -> Choice:
    """Give each client its highest-scored layers that fit; ties go to the layer nearer the input.

    Parameters
    ----------
    scores : numpy.ndarray
        Shape (n, L), higher is better.
    """
    orders = np.argsort(-scores, axis=1, kind="stable")
    masks = [
        skip_fill(order, candidates.costs, budget)
        for order, budget in zip(orders, candidates.budgets, strict=True)
    ]
    return Choice(np.stack(masks))
