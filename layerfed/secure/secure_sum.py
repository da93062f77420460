"""The server's side of one secure sum: it adds padded updates, and removes the pads from the sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from layerfed.secure.crypto import (
    UNIT,
    add_pad,
    agreed_key,
    commitment,
    public_key,
    recover,
)
from layerfed.secure.fixed_point import FixedPoint
from layerfed.secure.participant import PublicKeys

__all__ = ["SecureSum"]


class SecureSum:
    """Collects the keys, shares and padded updates of one round.

    Its memory is one vector of integers for all clients, and a few bytes for each pair of clients.

    Parameters
    ----------
    purpose : str
        Run and round, as each `Participant` has it.
    threshold : int
        t, the number of clients that must reach the end of the round.
    """

    def __init__(self, purpose: str, threshold: int) -> None:
        self.purpose = purpose
        self.threshold = threshold
        self.keys: dict[int, PublicKeys] = {}
        """The stated keys, by partition id; shares come in this order."""
        self._outbox: dict[int, Sequence[bytes]] = {}
        self._total: np.ndarray | None = None
        self._shares: dict[int, dict[int, bytes]] = {}
        self.survivors: list[int] = []
        """The clients whose updates are in the sum."""
        self.point: FixedPoint | None = None

    @property
    def clients(self) -> list[int]:
        """The clients that stated keys; secrets are shared among them."""
        return list(self.keys)

    @property
    def peers(self) -> list[int]:
        """The clients that have shared their secrets."""
        return [client for client in self.keys if client in self._outbox]

    def take_sealed(self, client: int, sealed: Sequence[bytes]) -> None:
        """Keep a client's sealed shares, one box for each client in their order, to pass them on."""
        self._outbox[client] = sealed

    def sealed_for(self, client: int) -> list[bytes]:
        """Return the boxes that the peers sealed for a client, in the order of the peers."""
        place = self.clients.index(client)
        return [self._outbox[peer][place] for peer in self.peers]

    def begin(self, limit: float, examples: Mapping[int, int]) -> FixedPoint:
        """Choose the integer format of the updates, once the peers are known.

        Parameters
        ----------
        limit : float
            c, the largest size of a coordinate; larger ones are clipped.
        examples : Mapping[int, int]
            d_i as each client stated it.

        Raises
        ------
        ValueError
            If the clients have more examples than a sum can count.
        """
        total = sum(examples[peer] for peer in self.peers)
        self.point = FixedPoint.fitting(limit, total, len(self.peers))
        return self.point

    def add(self, client: int, vector: np.ndarray) -> None:
        """Add a peer's padded update to the sum; the caller can drop it then."""
        if self._total is None:
            self._total = np.zeros(vector.shape, UNIT)
        self._total += vector
        self.survivors.append(client)

    def take_shares(self, client: int, shares: Sequence[bytes]) -> None:
        """Keep the shares that a survivor reveals: one for each peer, in their order."""
        for peer, part in zip(self.peers, shares, strict=True):
            self._shares.setdefault(peer, {})[self.clients.index(client)] = part

    @property
    def revealed(self) -> int:
        """The number of survivors that have revealed their shares."""
        return min((len(self._shares.get(peer, ())) for peer in self.peers), default=0)

    def open(self) -> tuple[np.ndarray, int]:
        """Remove all pads; return the mean update, float64 of shape (m,), and Σ d_i.

        Raises
        ------
        ValueError
            If too few clients revealed shares, or the shares give another secret than was agreed on.
        """
        if self.revealed < self.threshold or self._total is None or self.point is None:
            raise ValueError(
                f"{self.revealed} clients revealed shares, {self.threshold} are needed"
            )
        for peer in self.peers:
            shares = dict(list(self._shares[peer].items())[: self.threshold])
            secret = recover(shares)
            if peer in self.survivors:
                self._take_off_own_pad(peer, secret)
            else:
                self._take_off_common_pads(peer, secret)
        return self.point.decode(self._total, len(self.survivors))

    def _take_off_own_pad(self, peer: int, seed: bytes) -> None:
        if commitment(seed) != self.keys[peer].commitment:
            raise ValueError(f"the shares of client {peer}'s own pad are not of what it agreed on")
        assert self._total is not None
        add_pad(self._total, seed, subtract=True)

    def _take_off_common_pads(self, dropped: int, secret: bytes) -> None:
        if public_key(secret) != self.keys[dropped].masking:
            raise ValueError(f"the shares of client {dropped}'s key are not of what it agreed on")
        assert self._total is not None
        for survivor in self.survivors:
            key = agreed_key(secret, self.keys[survivor].masking, f"{self.purpose}: masks")
            # The opposite of what the survivor did.
            add_pad(self._total, key, subtract=survivor < dropped)
