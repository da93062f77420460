"""The layers whose gradient is largest relative to their parameters."""

from __future__ import annotations

import numpy as np

from layerfed.runs.records import Choice
from layerfed.server.candidates import Candidates
from layerfed.strategies.base import SelectiveStrategy
from layerfed.strategies.ranking import by_score


class RGN(SelectiveStrategy):
    """Each client trains the R_i layers with the largest ‖g_l‖ / ‖θ_l‖ [S].

    The released code ranks by the square [C], which is the same order.
    """

    name = "rgn"
    statistics = ("grad_norm_sq", "param_norm_sq")
    masks = "own"

    def select(self, candidates: Candidates) -> Choice:
        """Rank layers by the ratio of norms; a layer whose parameters are all zero ranks first."""
        gradient = np.sqrt(candidates.statistics["grad_norm_sq"])
        parameters = np.sqrt(candidates.statistics["param_norm_sq"])
        ratio = np.divide(
            gradient, parameters, out=np.full_like(gradient, np.inf), where=parameters > 0
        )
        return by_score(candidates, ratio)
