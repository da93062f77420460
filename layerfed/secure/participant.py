"""A client's side of one secure sum (Bonawitz et al., CCS 2017, with one mask graph for all clients).

Each client adds two kinds of masks to its update. Those that it has in common with each other client
cancel in the sum, since one of the two adds what the other subtracts. The one of its own is taken off
by the server, once enough clients say that the update is in the sum. What the server needs for this, and
to take off the common masks of a client that dropped out, lies shared among all clients from before
anybody trained; each client gives a share of the one *or* the other secret of a client, never of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from layerfed.secure.crypto import (
    SECRET_BYTES,
    add_mask,
    agreed_key,
    commitment,
    new_secret,
    public_key,
    seal,
    share,
    unseal,
)

__all__ = ["Participant", "PublicKeys"]

SMALLEST = 3
"""Clients that a sum needs: in a sum of two, each of them would learn the other's update."""


@dataclass(frozen=True)
class PublicKeys:
    """What a client states: keys for sealing shares and for common masks, and which its own mask is."""

    sealing: bytes
    masking: bytes
    commitment: bytes


@dataclass
class Participant:
    """What one client keeps from the first to the last message of a round.

    All fields are numbers, texts, bytes and lists of these, so that they fit Flower's context.

    Parameters
    ----------
    purpose : str
        Run and round, the same for all: nothing of one round is of use in another.
    own : int
        Its partition id.
    """

    purpose: str
    own: int
    sealing: bytes = field(default_factory=new_secret, repr=False)
    masking: bytes = field(default_factory=new_secret, repr=False)
    seed: bytes = field(default_factory=new_secret, repr=False)
    threshold: int = 0
    clients: list[int] = field(default_factory=list)
    sealing_keys: list[bytes] = field(default_factory=list)
    masking_keys: list[bytes] = field(default_factory=list)
    peers: list[int] = field(default_factory=list)
    sealed: list[bytes] = field(default_factory=list, repr=False)

    def keys(self) -> PublicKeys:
        """Return the public keys of this round."""
        return PublicKeys(public_key(self.sealing), public_key(self.masking), commitment(self.seed))

    def share_secrets(
        self,
        threshold: int,
        clients: Sequence[int],
        sealing_keys: Sequence[bytes],
        masking_keys: Sequence[bytes],
    ) -> list[bytes]:
        """Share the two secrets among the clients of the round.

        Parameters
        ----------
        threshold : int
            t, how many of them can recover a secret together: more than half, so that no server gets
            both secrets of a client by telling some that it dropped out and others that it did not.
        clients : Sequence[int]
            Partition ids, this client's among them.
        sealing_keys, masking_keys : Sequence[bytes]
            Their public keys, in this order.

        Returns
        -------
        list[bytes]
            The shares of each client, in this order, so sealed that it alone can open them.

        Raises
        ------
        ValueError
            If the round is not one to take part in.
        """
        if self.clients:
            raise ValueError("the secrets of this round are shared already")
        if self.own not in clients or len(set(clients)) != len(clients):
            raise ValueError("the clients of this secure sum are named wrongly")
        place, mine = clients.index(self.own), self.keys()
        if (sealing_keys[place], masking_keys[place]) != (mine.sealing, mine.masking):
            raise ValueError("the server passed on other keys than this client's")
        if len({*sealing_keys, *masking_keys}) != 2 * len(clients):
            raise ValueError("the server passed on the same key for several clients")
        if len(clients) < SMALLEST or not len(clients) < 2 * threshold <= 2 * len(clients):
            raise ValueError(
                f"a secure sum of {len(clients)} clients that {threshold} can open protects nobody"
            )
        self.threshold, self.clients = threshold, list(clients)
        self.sealing_keys, self.masking_keys = list(sealing_keys), list(masking_keys)
        of_seed = share(self.seed, threshold, len(clients))
        of_key = share(self.masking, threshold, len(clients))
        return [
            seal(self._sealing_key(client), a + b, self._route(self.own, client))
            for client, a, b in zip(clients, of_seed, of_key, strict=True)
        ]

    def mask(self, vector: np.ndarray, peers: Sequence[int], sealed: Sequence[bytes]) -> None:
        """Hide an update, in place.

        Parameters
        ----------
        vector : numpy.ndarray
            The update as `FixedPoint.encode` wrote it.
        peers : Sequence[int]
            The clients that have shared their secrets, this one among them.
        sealed : Sequence[bytes]
            What each of them sealed for this client.

        Raises
        ------
        ValueError
            If too few are left, or an update was masked in this round already: the difference of two
            updates under the same masks is no secret.
        """
        if self.peers:
            raise ValueError("an update was masked with the secrets of this round already")
        self._check_among("clients that shared secrets", peers, self.clients)
        for peer, shares in zip(peers, sealed, strict=True):
            self._opened(peer, shares)
        self.peers, self.sealed = list(peers), list(sealed)
        for peer in peers:
            if peer != self.own:
                key = agreed_key(self.masking, self._key_of(peer), f"{self.purpose}: masks")
                add_mask(vector, key, subtract=self.own > peer)
        add_mask(vector, self.seed)

    def reveal(self, survivors: Sequence[int]) -> list[bytes]:
        """Return a share for each peer: of its own mask if it survived, else of its masking key.

        Raises
        ------
        ValueError
            If so few survived that their sum would say too much.
        """
        self._check_among("survivors", survivors, self.peers)
        shares = []
        for peer, sealed in zip(self.peers, self.sealed, strict=True):
            of_seed, of_key = self._opened(peer, sealed)
            shares.append(of_seed if peer in survivors else of_key)
        return shares

    def _check_among(self, what: str, some: Sequence[int], known: Sequence[int]) -> None:
        if not set(some) <= set(known) or self.own not in some or len(set(some)) != len(some):
            raise ValueError(f"the {what} of this secure sum are named wrongly")
        if len(some) < self.threshold:
            raise ValueError(f"{len(some)} {what}, {self.threshold} are needed")

    def _opened(self, peer: int, sealed: bytes) -> tuple[bytes, bytes]:
        both = unseal(self._sealing_key(peer), sealed, self._route(peer, self.own))
        return both[:SECRET_BYTES], both[SECRET_BYTES:]

    def _sealing_key(self, client: int) -> bytes:
        other = self.sealing_keys[self.clients.index(client)]
        return agreed_key(self.sealing, other, f"{self.purpose}: shares")

    def _key_of(self, peer: int) -> bytes:
        return self.masking_keys[self.clients.index(peer)]

    def _route(self, sender: int, receiver: int) -> str:
        return f"{self.purpose}: {sender} to {receiver}"
