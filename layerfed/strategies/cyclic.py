"""Layers in turn, from the input to the output."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from layerfed.config import Section
from layerfed.runs.records import Choice
from layerfed.server.candidates import Candidates
from layerfed.strategies.base import SelectiveStrategy
from layerfed.strategies.ranking import affordable, by_orders


class Cyclic(SelectiveStrategy):
    """All clients train the layer whose turn it is, as in FedPart.

    FedPart (Wang et al., *Why Go Full?*, NeurIPS 2024) first trains the full network for some rounds.
    Then it trains one layer after the other from the input to the output, each for some rounds, and
    begins again. Here a turn lasts `period` rounds. A client with a larger budget also trains the next
    layers in the order, so clients of different budgets share as many layers as possible. The input
    follows the output. A client that cannot afford the layer whose turn it is takes the next ones that
    it can afford.

    """

    class Options(Section):
        """The warm-up."""

        warmup_rounds: Annotated[int, Field(ge=0)] = 0
        """Rounds at the beginning in which every client trains all layers. They ignore the run's budget
        and respect a node's own."""

    name = "cyclic"
    options: Options

    def bounded(self, server_round: int) -> bool:
        """Return True after the warm-up: budgets hold from the first turn on."""
        return server_round > self.options.warmup_rounds

    def selects_in(self, server_round: int) -> bool:
        """Return True in each warm-up round, and then in the first round of each turn."""
        since = server_round - self.options.warmup_rounds - 1
        return since < 0 or since % self.settings.period == 0

    def select(self, candidates: Candidates) -> Choice:
        """Fill each budget upwards from the layer whose turn it is."""
        if not self.bounded(candidates.round):
            return affordable(candidates)
        num_blocks = candidates.costs.shape[1]
        turn = (candidates.round - self.options.warmup_rounds - 1) // self.settings.period
        order = np.roll(np.arange(num_blocks), -turn)
        return by_orders(candidates, [order] * len(candidates.clients))
