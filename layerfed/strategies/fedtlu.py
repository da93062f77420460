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
    """Every client trains all layers; only the layers with the highest scores move the global model [T].

    Score(l) = ‖ΔW_l‖ / (√n_l · std(ΔW_l)), *a formula from a secondary source* (see
    `layerfed.exchange.change_score`), taken over the parameters of a layer.

    With `side = "server"`, ΔW_l is the mean update of the round, Σ_i w_{i,l} Δ_{i,l}: the change of
    layer l from θ^t. The share of layers with the highest scores is applied. The other layers and their
    server optimiser's state stay bit-identical. With `side = "client"`, ΔW_l is a client's own Δ_{i,l}.
    The client sends the share of its trained layers with the highest scores, and a layer is averaged
    over the clients that sent it. The head is always sent and applied.

    As published, layers are chosen after training. This saves bytes but no compute, and the run's budget
    has no effect. A node with a budget of its own trains as many layers as fit, drawn again in each
    round.

    """

    class Options(Section):
        """The score and the share of layers."""

        side: Literal["server", "client"] = "server"
        """Whether the server scores mean updates, or each client scores its own."""
        fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
        """Share of the trained layers, to the nearest whole number and at least one. Trained means: by
        any client (server), or by this client (client)."""
        norm: Literal["l1", "l2"] = "l2"
        """Norm of the change in the score."""

    name = "fedtlu"
    within_budget = False
    masks = "shared"
    options: Options

    @classmethod
    def masks_with(cls, options: Options) -> Masks:
        """Return "own" if clients choose which layers they send."""
        return "own" if options.side == "client" else "shared"

    @classmethod
    def refuse(cls, options: Options, config: RunConfig) -> None:
        """Refuse to let private clients choose which layers they send."""
        if options.side == "client" and config.privacy.mode != "none":
            raise ConfigError(
                f"strategy.side = 'client' does not go with privacy.mode = '{config.privacy.mode}': "
                "the choice of layers that a client sends depends on its own update, and no noise "
                "covers it; use strategy.side=server"
            )

    def select(self, candidates: Candidates) -> Choice:
        """Select all layers."""
        return affordable(candidates)

    def instruct(self, instruction: TrainInstruction) -> TrainInstruction:
        """Ask a client to send the layers that changed most, if clients score."""
        trained = sum(instruction.mask)
        if self.options.side == "server" or not trained:
            return instruction
        count = count_of(self.options.fraction, trained)
        return replace(instruction, upload=Upload(count, self.options.norm))

    def applied(self, mean: Aggregator) -> Collection[str]:
        """Return the layers whose mean updates have the highest scores, if the server scores."""
        if self.options.side == "client":
            return super().applied(mean)
        names = [block.name for block in self.layers.blocks if block.name in mean.weights]
        scores = {name: change_score(mean.changes(name), self.options.norm) for name in names}
        return [
            *highest(scores, count_of(self.options.fraction, len(names))),
            self.layers.head.name,
        ]
