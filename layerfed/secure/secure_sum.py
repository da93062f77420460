"""The server's side of one secure sum: it adds masked updates up, and takes the masks off their sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from layerfed.secure.crypto import (
    UNIT,
    add_mask,
    agreed_key,
    commitment,
    public_key,
    recover,
)
from layerfed.secure.fixed_point import FixedPoint
from layerfed.secure.participant import PublicKeys

__all__ = ["SecureSum"]


class SecureSum:
    """Collects keys, shares and masked updates of one round.

    It holds one vector of integers, whatever the number of clients, and a few bytes for each pair.

    Parameters
    ----------
    purpose : str
        Run and round, as each `Participant` has it.
    threshold : int
        t, how many clients must get to the end.
    """

    def __init__(self, purpose: str, threshold: int) -> None:
        self.purpose = purpose
        self.threshold = threshold
        self.keys: dict[int, PublicKeys] = {}
        """Of the clients that stated any, by partition id in the order of their shares."""
        self._outbox: dict[int, Sequence[bytes]] = {}
        self._total: np.ndarray | None = None
        self._shares: dict[int, dict[int, bytes]] = {}
        self.survivors: list[int] = []
        """Clients whose updates are in the sum."""
        self.point: FixedPoint | None = None

    @property
    def clients(self) -> list[int]:
        """Clients among which secrets are shared."""
        return list(self.keys)

    @property
    def peers(self) -> list[int]:
        """Those of them that have shared theirs."""
        return [client for client in self.keys if client in self._outbox]

    def take_sealed(self, client: int, sealed: Sequence[bytes]) -> None:
        """Keep a client's shares for all clients, sealed, in their order, to be passed on."""
        self._outbox[client] = sealed

    def sealed_for(self, client: int) -> list[bytes]:
        """Return what each peer sealed for a client, in the order of the peers."""
        place = self.clients.index(client)
        return [self._outbox[peer][place] for peer in self.peers]

    def begin(self, limit: float, examples: Mapping[int, int]) -> FixedPoint:
        """Choose how updates are written, once it is known whose may come.

        Parameters
        ----------
        limit : float
            c, beyond which coordinates are clipped.
        examples : Mapping[int, int]
            d_i as each client stated it.

        Raises
        ------
        ValueError
            If there are more examples than a sum can count.
        """
        total = sum(examples[peer] for peer in self.peers)
        self.point = FixedPoint.fitting(limit, total, len(self.peers))
        return self.point

    def add(self, client: int, vector: np.ndarray) -> None:
        """Fold in a peer's masked update; it can be dropped then."""
        if self._total is None:
            self._total = np.zeros(vector.shape, UNIT)
        self._total += vector
        self.survivors.append(client)

    def take_shares(self, client: int, shares: Sequence[bytes]) -> None:
        """Keep what a survivor reveals: a share for each peer, in their order."""
        for peer, part in zip(self.peers, shares, strict=True):
            self._shares.setdefault(peer, {})[self.clients.index(client)] = part

    @property
    def revealed(self) -> int:
        """How many survivors have revealed their shares."""
        return min((len(self._shares.get(peer, ())) for peer in self.peers), default=0)

    def open(self) -> tuple[np.ndarray, int]:
        """Take all masks off; return the mean update, float64 of shape (m,), and Σ d_i.

        Raises
        ------
        ValueError
            If too few clients revealed shares, or these are not of what was agreed on.
        """
        if self.revealed < self.threshold or self._total is None or self.point is None:
            raise ValueError(
                f"{self.revealed} clients revealed shares, {self.threshold} are needed"
            )
        for peer in self.peers:
            shares = dict(list(self._shares[peer].items())[: self.threshold])
            secret = recover(shares)
            if peer in self.survivors:
                self._take_off_own_mask(peer, secret)
            else:
                self._take_off_common_masks(peer, secret)
        return self.point.decode(self._total)

    def _take_off_own_mask(self, peer: int, seed: bytes) -> None:
        if commitment(seed) != self.keys[peer].commitment:
            raise ValueError(f"the shares of client {peer}'s own mask are not of what it agreed on")
        assert self._total is not None
        add_mask(self._total, seed, subtract=True)

    def _take_off_common_masks(self, dropped: int, secret: bytes) -> None:
        if public_key(secret) != self.keys[dropped].masking:
            raise ValueError(f"the shares of client {dropped}'s key are not of what it agreed on")
        assert self._total is not None
        for survivor in self.survivors:
            key = agreed_key(secret, self.keys[survivor].masking, f"{self.purpose}: masks")
            # The opposite of what the survivor did.
            add_mask(self._total, key, subtract=survivor < dropped)
