"""The layer versions that each node is known to keep."""

from __future__ import annotations

from collections.abc import Iterable

from layerfed.exchange.messages import Manifest

__all__ = ["Holdings"]


class Holdings:
    """The layer versions that each node is known to keep.

    Replies name the versions that a node keeps. A node that names none counts as one that has only the
    base. A wrong entry costs bytes or a second message, and never changes a result.

    Parameters
    ----------
    store : str
        Identity of the server's own layer store; empty if it has none.
    """

    def __init__(self, store: str = "") -> None:
        self._store = store
        self._held: dict[int, frozenset[str]] = {}
        self._stores: dict[int, str] = {}

    def learn(self, node: int, held: Iterable[str], store: str = "") -> None:
        """Record the digests that a node says it keeps, and the identity of its store."""
        self._held[node] = frozenset(held)
        if store:
            self._stores[node] = store

    def shares(self, node: int) -> bool:
        """Return whether a node reads the server's own store, so that no layer is sent to it."""
        return bool(self._store) and self._stores.get(node) == self._store

    @property
    def anyone_shares(self) -> bool:
        """Whether any node reads the server's store."""
        return any(self.shares(node) for node in self._stores)

    def lacks(self, node: int, manifest: Manifest, changed: Iterable[str]) -> tuple[str, ...]:
        """Return the changed layers that a node lacks, as if it were a separate device."""
        held = self._held.get(node, frozenset())
        return tuple(layer for layer in changed if manifest.digests[layer] not in held)
