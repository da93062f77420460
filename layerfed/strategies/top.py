"""The layers nearest the output."""

from __future__ import annotations

import numpy as np

from layerfed.records import Choice
from layerfed.strategies.base import Candidates, SelectiveStrategy
from layerfed.strategies.ranking import prefix


class Top(SelectiveStrategy):
    """Each client trains the R_i layers nearest the output [S, section V]."""

    name = "top"

    def select(self, candidates: Candidates) -> Choice:
        """Take layers from the output down while the budget lasts."""
        order = range(len(candidates.costs))[::-1]
        return Choice(np.stack([prefix(order, candidates.costs, r) for r in candidates.budgets]))
