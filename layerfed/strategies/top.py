"""The layers nearest the output."""

from __future__ import annotations

from layerfed.runs.records import Choice
from layerfed.server.candidates import Candidates
from layerfed.strategies.base import SelectiveStrategy
from layerfed.strategies.ranking import by_order


class Top(SelectiveStrategy):
    """Each client trains the R_i layers nearest the output [S, section V]."""

    name = "top"

    def select(self, candidates: Candidates) -> Choice:
        """Take layers from the output down while the budget lasts."""
        return by_order(candidates, range(candidates.costs.shape[1])[::-1])
