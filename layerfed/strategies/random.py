"""Layers drawn at random, anew for every client and round."""

from __future__ import annotations

import numpy as np

from layerfed.records import Choice
from layerfed.seeding import Stream, generator
from layerfed.strategies.base import Candidates, SelectiveStrategy
from layerfed.strategies.ranking import skip_fill


class Random(SelectiveStrategy):
    """Each client trains layers drawn uniformly without replacement (in the manner of LISA)."""

    name = "random"

    def select(self, candidates: Candidates) -> Choice:
        """Fill each budget in a random order that depends on seed, round and client only."""
        orders = [
            generator(candidates.seed, Stream.MASK, candidates.round, client).permutation(
                candidates.costs.shape[1]
            )
            for client in candidates.clients
        ]
        rows = zip(
            orders, candidates.costs, candidates.budgets, candidates.depth_costs, strict=True
        )
        return Choice(np.stack([skip_fill(order, c, r, d) for order, c, r, d in rows]))
