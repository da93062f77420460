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
        masks = []
        for client, budget in zip(candidates.clients, candidates.budgets, strict=True):
            rng = generator(candidates.seed, Stream.MASK, candidates.round, client)
            order = rng.permutation(len(candidates.costs))
            masks.append(skip_fill(order, candidates.costs, budget))
        return Choice(np.stack(masks))
