"""Layers drawn at random for each client in each round, or several times in a round."""

from __future__ import annotations

from dataclasses import replace
from logging import WARNING
from typing import Annotated

import numpy as np
from flwr.common.logger import log
from pydantic import Field

from layerfed.config import ConfigError, RunConfig, Section
from layerfed.config.seeding import Stream, generator
from layerfed.exchange import TrainInstruction
from layerfed.runs.records import Choice
from layerfed.server.candidates import Candidates
from layerfed.strategies.base import SelectiveStrategy
from layerfed.strategies.ranking import fill

#: Most draws for one client in a round. Clients state their number of examples, and the server makes and
#: sends a mask for each draw.
MOST_DRAWS = 4096


class Random(SelectiveStrategy):
    """Each client trains layers drawn uniformly without replacement.

    With `resample_steps` it draws again after that number of local steps, as LISA does (Pan et al.,
    arXiv 2403.17919). The budget holds at every step, so peak memory and a step's compute are those of
    one draw. The client sends all layers that it trained, so the uplink grows with the number of draws.
    A layer's update is that of the steps in which it was trained. The server makes the draws, so it
    knows which layers a reply must hold. Each draw begins with a new local optimiser.

    """

    class Options(Section):
        """The number of draws."""

        resample_steps: Annotated[int, Field(ge=0)] = 0
        """Local steps between two draws (LISA); 0 keeps one draw for the whole round."""

    name = "random"
    masks = "own"
    options: Options

    @classmethod
    def refuse(cls, options: Options, config: RunConfig) -> None:
        """Refuse a number of draws that would reveal a private client's number of examples."""
        if options.resample_steps and config.train.local_epochs and config.privacy.mode != "none":
            raise ConfigError(
                f"strategy.resample-steps = {options.resample_steps} with train.local-epochs does not "
                f"go with privacy.mode = '{config.privacy.mode}': the number of draws depends on a "
                "client's number of examples, which it does not state then; use train.local-steps"
            )

    def check(self) -> None:
        """Refuse several draws if the number of local steps is unknown."""
        if self.options.resample_steps and self.settings.local_steps is None:
            raise ConfigError(
                f"strategy.resample-steps = {self.options.resample_steps} needs to know how many steps "
                "clients make: give RoundSettings(local_steps=...) too"
            )

    def select(self, candidates: Candidates) -> Choice:
        """Fill each budget in random orders that depend only on seed, round and client."""
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
                        fill(rng.permutation(len(costs)), costs, budget, depth)
                        for _ in range(self._draws(int(examples)))
                    ]
                )
            )
        masks = np.stack([draws.any(axis=0) for draws in schedules])
        return Choice(masks, schedules=schedules if self.options.resample_steps else None)

    def instruct(self, instruction: TrainInstruction) -> TrainInstruction:
        """Add the number of steps for which a client trains each of several masks."""
        several = len(instruction.masks) > 1
        return replace(instruction, steps_each=self.options.resample_steps if several else 0)

    def _draws(self, examples: int) -> int:
        """Return the number of masks that a client trains in one round."""
        steps, each = self.settings.local_steps, self.options.resample_steps
        draws = 1 if not each or steps is None else -(-steps(examples) // each)
        if draws > MOST_DRAWS:
            log(
                WARNING,
                "a client's %d examples are %d draws of layers in a round; it trains one draw, since %d "
                "are the most: raise strategy.resample-steps",
                *(examples, draws, MOST_DRAWS),
            )
            return 1
        return draws
