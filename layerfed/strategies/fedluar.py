"""Layers that changed least relative to their size are not sent: their last update is used again."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from layerfed.config import ConfigError, RunConfig, Section
from layerfed.config.seeding import Stream, generator
from layerfed.exchange.clipping import norm_of
from layerfed.models.layers import Layer
from layerfed.runs.records import Choice
from layerfed.server.aggregation import Aggregator
from layerfed.server.candidates import Candidates
from layerfed.strategies.base import SelectiveStrategy
from layerfed.strategies.ranking import affordable


class FedLUAR(SelectiveStrategy):
    """Every client trains all layers; some are not sent, and move by their last update once more.

    FedLUAR (Kim, Kang and Lee, NeurIPS 2025, arXiv 2503.11146) scores a layer when it is sent:

        s_l = ‖Δ_l‖ / ‖θ_l‖

    with Δ_l the mean update and θ_l the layer before it, both over parameters. For the next round it
    draws layers without replacement, with probabilities proportional to 1 / s_l. A drawn layer moves by
    its last Δ_l, and keeps its score. In the first round everything is sent. The head is always sent.

    The rule is that of the authors' code, which draws single weight tensors and sends all vectors; here
    a layer is drawn as a whole. The recycled update is what the server's optimiser gets, so under
    `server.optimizer = "sgd"` with a rate of 1 the layer repeats its last step, as in the code. What
    the paper does under other optimisers could not be confirmed. Recycling saves bytes but no compute,
    and the run's budget has no effect. A node's own limit is respected.
    """

    class Options(Section):
        """The share of layers."""

        recycled: Annotated[float, Field(ge=0, lt=1)] = 0.5
        """Share of the layers that are not sent, to the nearest whole number."""

    name = "fedluar"
    _recycled: Sequence[str] = ()
    within_budget = False
    masks = "shared"
    options: Options

    @classmethod
    def refuse(cls, options: Any, config: RunConfig) -> None:
        """Refuse updates of which a part, or a second one, would be another change of the model."""
        if config.server.average_over == "cohort":
            raise ConfigError(
                "server.average-over = 'cohort' does not go with strategy.name = 'fedluar': a layer "
                "that is not sent moves by its last whole update; choose trained"
            )
        if config.server.aggregation in ("svd", "stack"):
            raise ConfigError(
                f"server.aggregation = '{config.server.aggregation}' does not go with strategy.name = "
                "'fedluar': each round gives adapters other factors, so their last update cannot be "
                "used once more; choose mean"
            )

    def selects_in(self, server_round: int) -> bool:
        """Return True: the layers are drawn in each round."""
        return True

    def select(self, candidates: Candidates) -> Choice:
        """Select all layers, and draw those that are not sent."""
        choice = affordable(candidates)
        known = np.array([f"score/{block.name}" in self.kept for block in self.layers.blocks])
        # At least one is sent, or no layer would ever move by a new update.
        most = min(len(known) - 1, int(known.sum()))
        count = min(int(self.options.recycled * len(known) + 0.5), most)
        recycled = np.zeros_like(known)
        if count:
            scores = [float(self.kept[f"score/{b.name}"]) for b in self._those(known)]
            inverse = 1.0 / np.maximum(scores, 1e-12)
            rng = generator(candidates.seed, Stream.MASK, candidates.round)
            places = np.flatnonzero(known)
            recycled[rng.choice(places, count, replace=False, p=inverse / inverse.sum())] = True
        self._recycled = [block.name for block in self._those(recycled)]
        return replace(choice, sent=choice.masks & ~recycled)

    def _those(self, chosen: np.ndarray) -> list[Layer]:
        return [block for block, on in zip(self.layers.blocks, chosen, strict=True) if on]

    def applied(self, mean: Aggregator) -> Collection[str]:
        """Return all layers, with those that are recycled; remember the updates of the others."""
        for layer in (block for block in self.layers.blocks if block.name in mean.weights):
            update, before = mean.update(layer.name), self.model.layer(layer.name)
            changed, size = (norm_of({t: x[t] for t in layer.parameters}) for x in (update, before))
            self.kept[f"score/{layer.name}"] = np.asarray(changed / max(size, 1e-6))
            for tensor, change in update.items():
                self.kept[f"update/{tensor}"] = change.astype(np.float32)
        for name in self._recycled:
            tensors = self.layers[name].tensors
            mean.add([name], {t: self.kept[f"update/{t}"] for t in tensors}, 1)
        return super().applied(mean)
