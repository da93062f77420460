"""The layers that changed most, chosen after training."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from layerfed.config import ConfigError, RunConfig, Section
from layerfed.exchange import TrainInstruction, Upload
from layerfed.exchange.change_score import (
    change_score,
    count_of,
    highest,
)
from layerfed.runs.records import Choice
from layerfed.server.aggregation import Aggregator
from layerfed.server.candidates import Candidates
from layerfed.strategies.base import Masks, SelectiveStrategy
from layerfed.strategies.ranking import affordable


class FedTLU(SelectiveStrategy):
    """Every client trains all layers; only the highest-scored ones move the global model [T].

    Score(l) = ‖ΔW_l‖ / (√n_l · std(ΔW_l)), *a formula from a secondary source* (see
    `layerfed.exchange.change_score`), taken over the parameters of a layer.

    On the server, ΔW_l is the mean update of the round, Σ_i w_{i,l} Δ_{i,l}: the change that layer l
    would make against θ^t. The highest-scored share of the layers is applied and the others stay as
    they are, bit by bit, their server optimiser included. On the clients, ΔW_l is a client's own
    Δ_{i,l}; it sends the highest-scored share of the layers it has trained, and each layer is averaged
    over those who sent it. The head is always sent and applied.

    As published, layers are chosen after training: bytes are saved, compute is not, and the run's
    budget says nothing. A node that itself states what it affords trains as many layers as fit, drawn
    anew each round.

    """

    class Options(Section):
        """Who scores, and how."""

        side: Literal["server", "client"] = "server"
        """The server scores mean updates, or each client its own."""
        fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
        """Share of the layers, to the nearest whole number and at least one: of those that were trained
        by some client (server), or by this client (client)."""
        norm: Literal["l1", "l2"] = "l2"
        """Norm of the change in the score."""

    name = "fedtlu"
    within_budget = False
    masks = "shared"
    options: Options

    @classmethod
    def masks_with(cls, options: Options) -> Masks:
        """Say that clients who choose what they send differ in it."""
        return "own" if options.side == "client" else "shared"

    @classmethod
    def refuse(cls, options: Options, config: RunConfig) -> None:
        """Refuse to have private clients choose what they send."""
        if options.side == "client" and config.privacy.mode != "none":
            raise ConfigError(
                f"strategy.side = 'client' does not go with privacy.mode = '{config.privacy.mode}': "
                "which layers a client sends would follow from its own update, and no noise covers "
                "that; use strategy.side=server"
            )

    def select(self, candidates: Candidates) -> Choice:
        """Select all layers."""
        return affordable(candidates)

    def instruct(self, instruction: TrainInstruction) -> TrainInstruction:
        """Ask a client to send the layers that changed most, where clients score."""
        trained = sum(instruction.mask)
        if self.options.side == "server" or not trained:
            return instruction
        count = count_of(self.options.fraction, trained)
        return replace(instruction, upload=Upload(count, self.options.norm))

    def applied(self, mean: Aggregator) -> Collection[str]:
        """Score the mean updates, where the server does."""
        if self.options.side == "client":
            return super().applied(mean)
        names = [block.name for block in self.layers.blocks if block.name in mean.weights]
        scores = {name: change_score(mean.changes(name), self.options.norm) for name in names}
        return [
            *highest(scores, count_of(self.options.fraction, len(names))),
            self.layers.head.name,
        ]
