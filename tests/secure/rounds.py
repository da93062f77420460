"""A secure sum between objects of one process: no Flower, no model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from layerfed.secure.fixed_point import FixedPoint
from layerfed.secure.participant import Participant
from layerfed.secure.secure_sum import SecureSum

LIMIT = 4.0


def elsewhere(mine: Participant) -> Participant:
    """The same client in its next process."""
    return Participant(**asdict(mine))


@dataclass
class Round:
    """n clients with an update each; some leave on the way."""

    updates: Mapping[int, np.ndarray]
    examples: Mapping[int, int]
    threshold: int

    def __post_init__(self) -> None:
        self.sum = SecureSum("run/1", self.threshold)
        self.clients = {c: Participant("run/1", c) for c in self.updates}
        self.padded: dict[int, np.ndarray] = {}
        self.point = FixedPoint(LIMIT, 1.0)

    def agree(self, away: Collection[int] = ()) -> None:
        for client, mine in self.clients.items():
            self.sum.keys[client] = mine.keys()
        keys = self.sum.keys.values()
        for client, mine in self.clients.items():
            if client not in away:
                sealed = mine.share_secrets(
                    self.threshold,
                    self.sum.clients,
                    [k.sealing for k in keys],
                    [k.masking for k in keys],
                )
                self.sum.take_sealed(client, sealed)
        self.point = self.sum.begin(LIMIT, self.examples)

    def train(self, away: Collection[int] = ()) -> None:
        for client in self.sum.peers:
            mine = self.clients[client] = elsewhere(self.clients[client])
            vector, _ = self.point.encode([self.updates[client]], self.examples[client])
            mine.pad(vector, self.sum.peers, self.sum.sealed_for(client))
            self.padded[client] = vector.copy()
            if client not in away:
                self.sum.add(client, vector)

    def unmask(self, away: Collection[int] = ()) -> None:
        for client in self.sum.survivors:
            if client not in away:
                shares = elsewhere(self.clients[client]).reveal(self.sum.survivors)
                self.sum.take_shares(client, shares)

    def exact_mean(self) -> np.ndarray:
        """The mean of the survivors' updates, computed in the clear."""
        kept = self.sum.survivors
        clipped = [np.clip(self.updates[c].astype(float), -LIMIT, LIMIT) for c in kept]
        weights = [self.examples[c] for c in kept]
        return np.average(clipped, axis=0, weights=weights)


def made(count: int, threshold: int, size: int = 40, seed: int = 0) -> Round:
    rng = np.random.default_rng(seed)
    names = [int(c) for c in rng.permutation(3 * count)[:count]]
    return Round(
        {c: (2 * rng.standard_normal(size)).astype(np.float32) for c in names},
        {c: int(rng.integers(1, 5000)) for c in names},
        threshold,
    )
