"""The messages of a secure sum, beside those of `exchange/messages.py`.

=============== ===================================================== ================================
message type    `secure` record, with `purpose`                       reply's `secure` record
=============== ===================================================== ================================
query.keys                                                            sealing, masking, commitment
query.shares    threshold, clients, sealing, masking (of each client) sealed: a box for each client
train           peers, sealed (from each), limit, scale               arrays: one vector, `masked`;
                                                                      no number of examples
query.unmask    survivors                                             shares: one for each peer
=============== ===================================================== ================================

`masking` and `masked` are names on the wire: the keys for common pads, and the padded vector. `purpose`
names run and round; a client answers only for the sum that it has keys for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from layerfed.exchange.arrays import RefusedReply, decode
from layerfed.exchange.messages import instruction, read_metrics
from layerfed.secure.crypto import KEY_BYTES, SEALED_BYTES, SECRET_BYTES, UNIT
from layerfed.secure.participant import PublicKeys

__all__ = [
    "PADDED",
    "answer",
    "attach",
    "question",
    "read_keys",
    "read_padded",
    "read_sealed",
    "read_secure",
    "read_shares",
    "secret_bytes",
]

# Names on the wire.
SECURE, PADDED = "secure", "masked"


# ------------------------------------------------------------------------------- instructions
def question(kind: str, node: int, server_round: int, timeout: float, **content: Any) -> Message:
    """Build a message of the protocol to one node."""
    message = instruction(kind, node, server_round=server_round, timeout=timeout)
    attach(message, **content)
    return message


def attach(message: Message, **content: Any) -> None:
    """Add entries of the secure sum to an instruction."""
    message.content[SECURE] = ConfigRecord(content)


def read_secure(message: Message) -> Mapping[str, Any] | None:
    """Return an instruction's entries of a secure sum, or None if it belongs to none."""
    return message.content.config_records.get(SECURE)


def secret_bytes(message: Message) -> int:
    """Return the bytes of keys, shares and lists of clients in a message."""
    record = message.content.config_records.get(SECURE, ConfigRecord())
    return sum(_size(value) for value in record.values())


def _size(value: Any) -> int:
    if isinstance(value, list):
        return sum(_size(item) for item in value)
    return len(value) if isinstance(value, bytes | str) else 8


# ------------------------------------------------------------------------------------ replies
def answer(message: Message, **content: Any) -> Message:
    """Answer a message of the protocol."""
    return Message(RecordDict({SECURE: ConfigRecord(content)}), reply_to=message)


# ---------------------------------------------------------------------------- reading replies
def _list_of(message: Message, name: str, sizes: Sequence[int]) -> list[bytes]:
    """Read a list of bytes objects, one of each size in `sizes`; refuse any other."""
    value = message.content.config_records.get(SECURE, ConfigRecord()).get(name)
    found = value if isinstance(value, list) else [value]
    if [len(item) if isinstance(item, bytes) else -1 for item in found] != list(sizes):
        raise RefusedReply(f"its '{name}' is not the {len(sizes)} × {sizes[0]} bytes that are due")
    return cast(list[bytes], found)


def read_keys(message: Message) -> PublicKeys:
    """Read the answer to `query.keys`."""
    names = asdict(PublicKeys(b"", b"", b""))
    return PublicKeys(*(_list_of(message, name, [KEY_BYTES])[0] for name in names))


def read_sealed(message: Message, clients: int) -> list[bytes]:
    """Read the answer to `query.shares`: a sealed box for each client."""
    return _list_of(message, "sealed", [SEALED_BYTES] * clients)


def read_shares(message: Message, peers: int) -> list[bytes]:
    """Read the answer to `query.unmask`: a share for each peer."""
    return _list_of(message, "shares", [SECRET_BYTES] * peers)


def read_padded(
    message: Message, expected: Iterable[np.ndarray]
) -> tuple[np.ndarray, Mapping[str, float]]:
    """Read a training reply with a padded update: the vector, and the metrics beside it.

    Parameters
    ----------
    message : Message
    expected : Iterable[numpy.ndarray]
        The global tensors whose updates the vector holds.

    Raises
    ------
    RefusedReply
        If it is not one vector of the due size. Nothing else of it can be checked.
    """
    metrics = read_metrics(message, required=())
    record = message.content.array_records.get("arrays", ArrayRecord())
    if set(record) != {PADDED}:
        raise RefusedReply(
            f"it holds {', '.join(sorted(record)[:3]) or 'nothing'}, and not one padded vector"
        )
    size = sum(values.size for values in expected) + 1
    try:
        return decode(record[PADDED], (size,), UNIT), metrics
    except RefusedReply as error:
        raise RefusedReply(f"'{PADDED}' is {error}") from None
