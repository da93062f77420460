"""The draw of the blocks that a client's network leaves out, before layers are selected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from layerfed.config import ConfigError, TrainConfig
from layerfed.config.seeding import Stream, generator
from layerfed.models.layers import LayerMap

__all__ = ["Skipping"]


@dataclass(frozen=True)
class Skipping:
    """A rule for the blocks that a client's network leaves out in a round.

    `substack` leaves out a fixed number, drawn uniformly, as FedRA's released code does. `random` leaves
    out block l of L, from 1, with the probability 2 · rate · l / (L + 1): the rate grows with depth, and
    its mean is `rate`. DropPEFT draws for each batch, here a draw lasts as long as a selection, since a
    block must run to be in a mask. One block at least runs.

    Attributes
    ----------
    rule : {"random", "substack"}
    rate : float
    free : tuple[bool, ...]
        For each block whether the network runs without it. Others are never left out.
    """

    rule: Literal["random", "substack"]
    rate: float
    free: tuple[bool, ...]

    @classmethod
    def of(cls, train: TrainConfig, layers: LayerMap) -> Skipping | None:
        """Return the rule that a configuration names; None if it names none.

        Raises
        ------
        ConfigError
            If there is no block that can be left out.
        """
        if train.skip == "none":
            return None
        free = tuple(block.name in layers.skippable for block in layers.blocks)
        if not any(free):
            raise ConfigError(
                f"train.skip = '{train.skip}' finds no block that can be left out: none is residual, "
                "called once, and returns one tensor of its input's shape; set train.skip=none, "
                "model.units=blocks, or choose another model"
            )
        return cls(train.skip, train.skip_rate, free)

    def runs(self, seed: int, number: int, client: int) -> np.ndarray:
        """Return the blocks that run, booleans of shape (L,), in a round on a client."""
        rng, free = generator(seed, Stream.SKIP, number, client), np.array(self.free)
        if self.rule == "random":
            rates = 2 * self.rate * np.arange(1, len(free) + 1) / (len(free) + 1)
            runs = ~free | (rng.random(len(free)) >= rates)
            runs[0] |= not runs.any()
            return runs
        count = min(round(self.rate * len(free)), int(free.sum()), len(free) - 1)
        runs = np.ones(len(free), dtype=bool)
        runs[rng.choice(np.flatnonzero(free), count, replace=False)] = False
        return runs
