"""The layers that changed most, chosen after training."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from layerfed.config import RunConfig
from layerfed.exchange import upload_of
from layerfed.exchange.change_score import (
    Norm,
    change_score,
    count_of,
    highest,
)
from layerfed.runs.records import Choice
from layerfed.server.aggregation import Aggregator
from layerfed.server.candidates import Candidates
from layerfed.strategies.base import SelectiveStrategy
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

    Parameters
    ----------
    layers : LayerMap
    side : {"server", "client"} (default: "server")
        Who scores.
    fraction : float (default: 0.5)
        Share of the layers, in (0, 1], to the nearest whole number and at least one: of those that
        anybody trained (server), or of those that the client trained.
    norm : {"l1", "l2"} (default: "l2")
    **kwargs
        Those of `SelectiveStrategy`.
    """

    name = "fedtlu"
    within_budget = False

    def __init__(
        self,
        layers: Any,
        *,
        side: Literal["server", "client"] = "server",
        fraction: float = 0.5,
        norm: Norm = "l2",
        **kwargs: Any,
    ) -> None:
        self.side = side
        self.fraction = fraction
        self.norm = norm
        super().__init__(layers, **kwargs)

    @classmethod
    def options(cls, config: RunConfig) -> dict[str, Any]:
        """Take `strategy.side`, `strategy.fraction` and `strategy.norm`."""
        section = config.strategy
        return {"side": section.side, "fraction": section.fraction, "norm": section.norm}

    def select(self, candidates: Candidates) -> Choice:
        """Select all layers."""
        return affordable(candidates)

    def instructions(self, choice: Choice, row: int) -> dict[str, Any]:
        """Ask a client to send the layers that changed most, where clients score."""
        trained = int(choice.masks[row].sum())
        if self.side == "server" or not trained:
            return {}
        return upload_of(count_of(self.fraction, trained), self.norm)

    def applied(self, mean: Aggregator) -> Collection[str]:
        """Score the mean updates, where the server does."""
        if self.side == "client":
            return super().applied(mean)
        names = [block.name for block in self.layers.blocks if block.name in mean.weights]
        scores = {name: change_score(mean.changes(name), self.norm) for name in names}
        return [*highest(scores, count_of(self.fraction, len(names))), self.layers.head.name]
