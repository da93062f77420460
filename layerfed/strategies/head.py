"""The head alone: what choosing layers adds is the difference to it."""

from __future__ import annotations

import numpy as np

from layerfed.runs.records import Choice
from layerfed.server.candidates import Candidates
from layerfed.strategies.base import SelectiveStrategy


class Head(SelectiveStrategy):
    """Every client trains the head and no block, so it needs no budget."""

    name = "head"
    within_budget = False
    masks = "shared"

    def select(self, candidates: Candidates) -> Choice:
        """Select no layer."""
        return Choice(np.zeros(candidates.costs.shape, dtype=bool))
