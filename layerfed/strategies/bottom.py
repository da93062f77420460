"""The layers nearest the input."""

from __future__ import annotations

from layerfed.runs.records import Choice
from layerfed.server.candidates import Candidates
from layerfed.strategies.base import SelectiveStrategy
from layerfed.strategies.ranking import by_order


class Bottom(SelectiveStrategy):
    """Each client trains the R_i layers nearest the input [S, section V]."""

    name = "bottom"

    def select(self, candidates: Candidates) -> Choice:
        """Take layers from the input up while the budget lasts."""
        return by_order(candidates, range(candidates.costs.shape[1]))
