"""Layers drawn at random, anew for every client and round, or more often."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from layerfed.config import ConfigError, RunConfig
from layerfed.exchange import scheduled
from layerfed.runs.records import Choice
from layerfed.seeding import Stream, generator
from layerfed.server.candidates import Candidates
from layerfed.strategies.base import SelectiveStrategy
from layerfed.strategies.ranking import skip_fill


class Random(SelectiveStrategy):
    """Each client trains layers drawn uniformly without replacement.

    With `resample_steps`, it trains others after so many of its local steps, in the manner of LISA (Pan
    et al., arXiv 2403.17919): the budget holds at every step, so peak memory and the compute of a step
    are those of one draw. All layers it has touched are sent and averaged: the uplink grows with the
    number of draws, and the update of a layer is that of the steps in which it was trained. The server
    draws, so that it knows which layers a reply must hold, and each draw begins with a new local
    optimiser.

    Parameters
    ----------
    layers : LayerMap
    resample_steps : int (default: 0)
        Local steps between two draws; 0 keeps one draw for the whole round.
    local_steps : Callable[[int], int], optional
        τ_i, the local steps of a client with so many examples; needed for `resample_steps`.
    **kwargs
        Those of `SelectiveStrategy`.

    Raises
    ------
    ConfigError
        If `resample_steps` is given without `local_steps`.
    """

    name = "random"

    def __init__(
        self,
        layers: Any,
        *,
        resample_steps: int = 0,
        local_steps: Callable[[int], int] | None = None,
        **kwargs: Any,
    ) -> None:
        if resample_steps and local_steps is None:
            raise ConfigError(
                f"strategy.resample-steps = {resample_steps} needs to know how many steps clients "
                "make: give Random(local_steps=...) too"
            )
        self.resample_steps = resample_steps
        self.local_steps = local_steps
        super().__init__(layers, **kwargs)

    @classmethod
    def options(cls, config: RunConfig) -> dict[str, Any]:
        """Take `strategy.resample-steps`, and the number of steps from the train section."""
        return {
            "resample_steps": config.strategy.resample_steps,
            "local_steps": config.train.steps,
        }

    def select(self, candidates: Candidates) -> Choice:
        """Fill each budget in random orders that depend on seed, round and client only."""
        schedules = []
        rows = zip(
            candidates.clients,
            candidates.examples,
            candidates.costs,
            candidates.budgets,
            candidates.depth_costs,
            strict=True,
        )
        for client, examples, costs, budget, depth in rows:
            rng = generator(candidates.seed, Stream.MASK, candidates.round, client)
            schedules.append(
                np.stack(
                    [
                        skip_fill(rng.permutation(len(costs)), costs, budget, depth)
                        for _ in range(self._draws(int(examples)))
                    ]
                )
            )
        masks = np.stack([draws.any(axis=0) for draws in schedules])
        return Choice(masks, schedules=schedules if self.resample_steps else None)

    def instructions(self, choice: Choice, row: int) -> dict[str, Any]:
        """Send a client the masks it trains one after the other, where there are several."""
        schedule = choice.schedule(row)
        return scheduled(schedule, self.resample_steps) if len(schedule) > 1 else {}

    def _draws(self, examples: int) -> int:
        """Return how many masks a client trains in one round."""
        if not self.resample_steps or self.local_steps is None:
            return 1
        return -(-self.local_steps(examples) // self.resample_steps)
