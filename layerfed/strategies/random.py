"""Layers drawn at random, anew for every client and round, or more often."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import numpy as np
from pydantic import Field

from layerfed.config import ConfigError, RunConfig, Section
from layerfed.config.seeding import Stream, generator
from layerfed.exchange import TrainInstruction
from layerfed.runs.records import Choice
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

    """

    class Options(Section):
        """How often it draws."""

        resample_steps: Annotated[int, Field(ge=0)] = 0
        """Local steps between two draws (LISA); 0 keeps one draw for the whole round."""

    name = "random"
    masks = "own"
    options: Options

    @classmethod
    def refuse(cls, options: Options, config: RunConfig) -> None:
        """Refuse a number of draws that would say how many examples a private client has."""
        if options.resample_steps and config.train.local_epochs and config.privacy.mode != "none":
            raise ConfigError(
                f"strategy.resample-steps = {options.resample_steps} with train.local-epochs does not "
                f"go with privacy.mode = '{config.privacy.mode}': how often to draw would follow from a "
                "client's number of examples, which it does not say then; use train.local-steps"
            )

    def check(self) -> None:
        """Refuse to draw several times where the number of local steps is unknown."""
        if self.options.resample_steps and self.settings.local_steps is None:
            raise ConfigError(
                f"strategy.resample-steps = {self.options.resample_steps} needs to know how many steps "
                "clients make: give RoundSettings(local_steps=...) too"
            )

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
        return Choice(masks, schedules=schedules if self.options.resample_steps else None)

    def instruct(self, instruction: TrainInstruction) -> TrainInstruction:
        """Say how many steps a client trains each of several masks."""
        several = len(instruction.masks) > 1
        return replace(instruction, steps_each=self.options.resample_steps if several else 0)

    def _draws(self, examples: int) -> int:
        """Return how many masks a client trains in one round."""
        steps, each = self.settings.local_steps, self.options.resample_steps
        return 1 if not each or steps is None else -(-steps(examples) // each)
