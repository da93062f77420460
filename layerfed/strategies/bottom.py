"""The layers nearest the input."""

from __future__ import annotations

import numpy as np

from layerfed.records import Choice
from layerfed.strategies.base import Candidates, SelectiveStrategy
from layerfed.strategies.ranking import prefix


class Bottom(SelectiveStrategy):
    """Each client trains the R_i layers nearest the input [S, section V]."""

    name = "bottom"

    def select(self, candidates: Candidates) -> Choice:
        """Take layers from the input up while the budget lasts."""
        order = range(len(candidates.costs))
        return Choice(np.stack([prefix(order, candidates.costs, r) for r in candidates.budgets]))
