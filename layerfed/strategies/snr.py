"""The layers whose gradient has the largest signal-to-noise ratio."""

from __future__ import annotations

from typing import Any, Literal

from layerfed.config import Section
from layerfed.models.layers import LayerMap
from layerfed.runs.records import Choice
from layerfed.server.candidates import Candidates
from layerfed.strategies.base import SelectiveStrategy
from layerfed.strategies.ranking import by_score


class SNR(SelectiveStrategy):
    """Each client trains the R_i layers with the largest signal-to-noise ratio of the gradient."""

    class Options(Section):
        """The formula of the ratio."""

        form: Literal["paper", "code"] = "paper"
        """`paper`: |mean(g_l)| / var(g_l) over all elements of the layer's gradient [S]. `code`:
        mean(g)² / std(g) of each tensor, summed over the layer [C]. The two rank layers differently. The
        released code uses the gradient summed over its probe batches. Here the ratio of each batch is
        averaged; on one batch both give the same."""

    name = "snr"
    statistics = ("snr",)
    masks = "own"
    options: Options

    def __init__(self, layers: LayerMap, **kwargs: Any) -> None:
        super().__init__(layers, **kwargs)
        if self.options.form == "code":
            self.statistics = ("snr_code",)

    def select(self, candidates: Candidates) -> Choice:
        """Rank layers by the probed ratio."""
        (statistic,) = self.statistics
        return by_score(candidates, candidates.statistics[statistic])
