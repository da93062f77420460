"""A client's side of one secure sum (Bonawitz et al., CCS 2017, with the complete graph of clients).

Each client adds two kinds of pads to its update:

- A common pad with each other client. One of the two adds it and the other subtracts it, so it cancels
  in the sum.
- A pad of its own. The server removes it once enough clients say that the update is in the sum.

Before training each client shares two secrets among all clients: the seed of its own pad, and the key of
its common pads. The server needs the first if the client's update is in the sum, and the second if the
client dropped out. A client reveals a share of the one *or* the other secret of a client, never of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from layerfed.config.secagg import SMALLEST
from layerfed.secure.crypto import (
    SECRET_BYTES,
    add_pad,
    agreed_key,
    commitment,
    new_secret,
    public_key,
    seal,
    share,
    unseal,
)

__all__ = ["Participant", "PublicKeys"]


@dataclass(frozen=True)
class PublicKeys:
    """A client's public keys: for sealing shares, for common pads (`masking`), and its commitment.

    The commitment identifies the seed of the client's own pad. The names are those on the wire.
    """

    sealing: bytes
    masking: bytes
    commitment: bytes


@dataclass
class Participant:
    """One client's state in a secure sum, from the first to the last message of a round.

    Every field is a number, a text, bytes or a list of these, so that it fits Flower's context.

    Parameters
    ----------
    purpose : str
        Run and round, the same for all clients. Keys and shares of one round are useless in another.
    own : int
        Its partition id.
    """

    purpose: str
    own: int
    sealing: bytes = field(default_factory=new_secret, repr=False)
    padding: bytes = field(default_factory=new_secret, repr=False)
    seed: bytes = field(default_factory=new_secret, repr=False)
    threshold: int = 0
    clients: list[int] = field(default_factory=list)
    sealing_keys: list[bytes] = field(default_factory=list)
    padding_keys: list[bytes] = field(default_factory=list)
    peers: list[int] = field(default_factory=list)
    sealed: list[bytes] = field(default_factory=list, repr=False)

    def keys(self) -> PublicKeys:
        """Return the public keys of this round."""
        return PublicKeys(public_key(self.sealing), public_key(self.padding), commitment(self.seed))

    def share_secrets(
        self,
        threshold: int,
        clients: Sequence[int],
        sealing_keys: Sequence[bytes],
        padding_keys: Sequence[bytes],
    ) -> list[bytes]:
        """Share the two secrets among the clients of the round.

        Parameters
        ----------
        threshold : int
            t, the number of clients that can recover a secret together. It is more than half, so a
            server that tells clients different stories about a dropout cannot get both secrets.
        clients : Sequence[int]
            Partition ids, this client's among them.
        sealing_keys, padding_keys : Sequence[bytes]
            The clients' public keys for sealing and for common pads, in the order of `clients`.

        Returns
        -------
        list[bytes]
            For each client, in the same order, its two shares, sealed so that only it can open them.

        Raises
        ------
        ValueError
            If this client must not take part: a key or the list of clients is wrong, or the threshold
            protects nobody.
        """
        if self.clients:
            raise ValueError("the secrets of this round are shared already")
        if self.own not in clients or len(set(clients)) != len(clients):
            raise ValueError("the clients of this secure sum are named wrongly")
        place, mine = clients.index(self.own), self.keys()
        if (sealing_keys[place], padding_keys[place]) != (mine.sealing, mine.masking):
            raise ValueError("the server passed on other keys than this client's")
        if len({*sealing_keys, *padding_keys}) != 2 * len(clients):
            raise ValueError("the server passed on the same key for several clients")
        if len(clients) < SMALLEST or not len(clients) < 2 * threshold <= 2 * len(clients):
            raise ValueError(
                f"a secure sum of {len(clients)} clients that {threshold} can open protects nobody"
            )
        self.threshold, self.clients = threshold, list(clients)
        self.sealing_keys, self.padding_keys = list(sealing_keys), list(padding_keys)
        of_seed = share(self.seed, threshold, len(clients))
        of_key = share(self.padding, threshold, len(clients))
        return [
            seal(self._sealing_key(client), a + b, self._route(self.own, client))
            for client, a, b in zip(clients, of_seed, of_key, strict=True)
        ]

    def pad(self, vector: np.ndarray, peers: Sequence[int], sealed: Sequence[bytes]) -> None:
        """Hide an update, in place.

        Parameters
        ----------
        vector : numpy.ndarray
            The update as `FixedPoint.encode` wrote it.
        peers : Sequence[int]
            The clients that have shared their secrets, this one among them.
        sealed : Sequence[bytes]
            The shares that each of them sealed for this client.

        Raises
        ------
        ValueError
            If too few clients are left, or this client padded an update in this round already: two
            updates under the same pads would reveal their difference.
        """
        if self.peers:
            raise ValueError("an update was padded with the secrets of this round already")
        self._check_among("clients that shared secrets", peers, self.clients)
        for peer, shares in zip(peers, sealed, strict=True):
            self._opened(peer, shares)
        self.peers, self.sealed = list(peers), list(sealed)
        for peer in peers:
            if peer != self.own:
                key = agreed_key(self.padding, self._key_of(peer), f"{self.purpose}: masks")
                add_pad(vector, key, subtract=self.own > peer)
        add_pad(vector, self.seed)

    def reveal(self, survivors: Sequence[int]) -> list[bytes]:
        """Return a share for each peer: of its own pad's seed if it survived, else of its padding key.

        Raises
        ------
        ValueError
            If the survivors are named wrongly, or are fewer than the threshold.
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
        if len(some) < (needed := max(SMALLEST, self.threshold)):
            raise ValueError(f"{len(some)} {what}, {needed} are needed")

    def _opened(self, peer: int, sealed: bytes) -> tuple[bytes, bytes]:
        both = unseal(self._sealing_key(peer), sealed, self._route(peer, self.own))
        return both[:SECRET_BYTES], both[SECRET_BYTES:]

    def _sealing_key(self, client: int) -> bytes:
        other = self.sealing_keys[self.clients.index(client)]
        return agreed_key(self.sealing, other, f"{self.purpose}: shares")

    def _key_of(self, peer: int) -> bytes:
        return self.padding_keys[self.clients.index(peer)]

    def _route(self, sender: int, receiver: int) -> str:
        return f"{self.purpose}: {sender} to {receiver}"
