"""The layers whose gradient has the largest signal-to-noise ratio."""

from __future__ import annotations

from layerfed.records import Choice
from layerfed.strategies.base import Candidates, SelectiveStrategy
from layerfed.strategies.ranking import by_score


class SNR(SelectiveStrategy):
    """Each client trains the R_i layers with the largest |mean(g_l)| / var(g_l) [S].

    Mean and variance run over the elements of the layer's gradient.
    """

    name = "snr"
    statistics = ("snr",)

    def select(self, candidates: Candidates) -> Choice:
        """Rank by the probed ratio."""
        return by_score(candidates, candidates.statistics["snr"])
