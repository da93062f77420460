"""Every client trains every selectable layer, whatever its budget: the cost to compare with."""

from __future__ import annotations

import numpy as np

from layerfed.runs.records import Choice
from layerfed.server.candidates import Candidates
from layerfed.strategies.base import SelectiveStrategy


class Full(SelectiveStrategy):
    """Full fine-tuning (embeddings stay frozen, as in every strategy)."""

    name = "full"
    within_budget = False
    masks = "shared"

    def select(self, candidates: Candidates) -> Choice:
        """Select all layers."""
        return Choice(np.ones(candidates.costs.shape, dtype=bool))
