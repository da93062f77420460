"""The ledger: bytes carried in a round, by client and direction."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields

__all__ = ["Ledger", "Traffic"]


@dataclass
class Traffic:
    """Bytes of tensors, statistics, keys and shares of one client in one round, without framing.

    Attributes
    ----------
    down, up : int
        Bytes that a network would have carried if each client were a separate device.
    moved_down, moved_up : int
        Bytes that messages carried from process to process.
    full_down, full_up : int
        Bytes of sending the whole model once a client and round each way, without a probe.
    """

    down: int = 0
    up: int = 0
    moved_down: int = 0
    moved_up: int = 0
    full_down: int = 0
    full_up: int = 0

    def went_down(self, size: int, *, moved: int | None = None) -> None:
        """Add bytes from the server to the client; `moved` of them left the process, by default all."""
        self.down += size
        self.moved_down += size if moved is None else moved

    def went_up(self, size: int, *, moved: int | None = None) -> None:
        """Add bytes from the client to the server; `moved` of them left the process, by default all."""
        self.up += size
        self.moved_up += size if moved is None else moved


class Ledger:
    """The traffic of one round, by client (its partition id)."""

    def __init__(self) -> None:
        self.rows: dict[int, Traffic] = defaultdict(Traffic)

    def __getitem__(self, client: int) -> Traffic:
        """Return a client's traffic; callers add to it."""
        return self.rows[client]

    def total(self) -> Traffic:
        """Return the sums over clients."""
        names = [field.name for field in fields(Traffic)]
        return Traffic(*(sum(getattr(row, name) for row in self.rows.values()) for name in names))
