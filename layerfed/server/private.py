"""Central differential privacy and its accounting, as steps of a round."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from layerfed.exchange.clipping import clipped
from layerfed.privacy.account import PrivacyAccount
from layerfed.privacy.protection import Entropy, add_noise
from layerfed.runs.records import RoundRecord
from layerfed.server.steps import Arrival, ServerStep

__all__ = ["Accounting", "CentralNoise"]


@dataclass(frozen=True)
class CentralNoise(ServerStep):
    """Bounds each client's part of the sums, and adds Gaussian noise to the sums.

    A client's part of all sums together has a norm of at most C, whatever it sends and states.
    Exchanging its data for others moves the sums by at most 2C. The sum of each trained layer gets
    N(0, (z·C)²) in each coordinate. It is then divided by the number of clients that trained the layer,
    which follows from masks and replies and not from updates.

    Attributes
    ----------
    clip : float
        C.
    noise : float
        z.
    entropy : Callable[[int], bytes]
        The source of the noise.
    """

    clip: float
    noise: float
    entropy: Entropy = os.urandom

    def receive(self, arrival: Arrival, record: RoundRecord) -> None:
        """Clip the update. E2 does not use its norm, since it would be stated without noise."""
        arrival.update, _ = clipped(arrival.update, self.clip)
        arrival.measured = False

    def weigh(self, examples: int) -> int:
        """Return 1: every client has the same weight."""
        return 1

    def close(self, sums: Mapping[str, np.ndarray], record: RoundRecord) -> None:
        """Add the noise to each sum, once."""
        for total in sums.values():
            add_noise(total, self.noise * self.clip, self.entropy)


@dataclass(frozen=True)
class Accounting(ServerStep):
    """Notes in each round's record the ε that the run has spent so far."""

    account: PrivacyAccount

    def record(self, record: RoundRecord) -> None:
        """Count the round, and note ε after it."""
        self.account.count(record.round, record.ledger.rows)
        record.epsilon, record.epsilon_covers = self.account.epsilon, self.account.covers
