"""Full fine-tuning, whose result and cost the other strategies are compared with."""

from __future__ import annotations

import numpy as np

from layerfed.runs.records import Choice
from layerfed.server.candidates import Candidates
from layerfed.strategies.base import SelectiveStrategy


class Full(SelectiveStrategy):
    """Every client trains every block, whatever its budget; embeddings stay frozen as always."""

    name = "full"
    within_budget = False
    masks = "shared"

    def select(self, candidates: Candidates) -> Choice:
        """Select all layers."""
        return Choice(np.ones(candidates.costs.shape, dtype=bool))
