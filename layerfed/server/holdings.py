"""Which layer versions each node is known to hold."""

from __future__ import annotations

from collections.abc import Iterable

from layerfed.exchange.messages import Manifest

__all__ = ["Holdings"]


class Holdings:
    """The layer versions that each node is known to hold.

    Learnt from replies, in which a node names those it keeps; a node that says nothing is taken to hold
    nothing but the base. Being wrong costs bytes, or a layer sent again, never a wrong result.

    Parameters
    ----------
    store : str
        Identity of the server's own layer store; empty where it has none.
    """

    def __init__(self, store: str = "") -> None:
        self._store = store
        self._held: dict[int, frozenset[str]] = {}
        self._stores: dict[int, str] = {}

    def learn(self, node: int, held: Iterable[str], store: str = "") -> None:
        """Take note of the digests a node says it holds, and of the store it keeps them in."""
        self._held[node] = frozenset(held)
        if store:
            self._stores[node] = store

    def shares(self, node: int) -> bool:
        """Say whether a node sees the server's own store, so that nothing need be sent to it."""
        return bool(self._store) and self._stores.get(node) == self._store

    @property
    def anyone_shares(self) -> bool:
        """Whether any node sees the server's store."""
        return any(self.shares(node) for node in self._stores)

    def lacks(self, node: int, manifest: Manifest, changed: Iterable[str]) -> tuple[str, ...]:
        """Return which of the changed layers a node, as a device of its own, does not hold."""
        held = self._held.get(node, frozenset())
        return tuple(layer for layer in changed if manifest.digests[layer] not in held)
