"""Central differential privacy and its account, as steps of a round."""

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
    """Bounds what each client adds to the sums, and adds Gaussian noise to them.

    What a client adds to the sums of all layers together has a norm of at most C, whatever it sends and
    however many examples it states; exchanging its data for others moves them by at most 2C. The sum of
    each layer that somebody trained gets N(0, (z·C)²) in each coordinate before it is divided by the
    number of those who did, which masks and replies say, and no update does.

    Attributes
    ----------
    clip : float
        C.
    noise : float
        z.
    entropy : Callable[[int], bytes]
        Where noise comes from.
    """

    clip: float
    noise: float
    entropy: Entropy = os.urandom

    def receive(self, arrival: Arrival, record: RoundRecord) -> None:
        """Clip the update; its norm stays unknown, since it would be stated without noise."""
        arrival.update, _ = clipped(arrival.update, self.clip)
        arrival.measured = False

    def weigh(self, examples: int) -> int:
        """Count every client alike."""
        return 1

    def close(self, sums: Mapping[str, np.ndarray], record: RoundRecord) -> None:
        """Add the noise, once."""
        for total in sums.values():
            add_noise(total, self.noise * self.clip, self.entropy)


@dataclass(frozen=True)
class Accounting(ServerStep):
    """Notes in each round's record what the run has spent of privacy so far."""

    account: PrivacyAccount

    def record(self, record: RoundRecord) -> None:
        """Count the round, and note ε after it."""
        self.account.count(record.round, record.ledger.rows)
        record.epsilon, record.epsilon_covers = self.account.epsilon, self.account.covers
