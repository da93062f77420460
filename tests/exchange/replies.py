"""Well-formed and forged replies, for the tests of the functions that read them."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto

from layerfed.exchange import RefusedReply, encode, instruction, read_train_reply

SHAPE, DTYPE = (3, 4), np.dtype(np.float32)
EXPECTED: dict[str, np.ndarray] = {
    "w": np.zeros(SHAPE, DTYPE),
    "count": np.zeros((), np.int64),
}


def ask(kind: str = "train", **config: Any) -> Message:
    return instruction(kind, 7, server_round=3, timeout=60.0, **config)


def update(**changes: np.ndarray) -> dict[str, np.ndarray]:
    values = np.arange(12, dtype=np.float32).reshape(SHAPE)
    return {"w": values, "count": np.asarray(5, dtype=np.int64), **changes}


def over_the_wire(message: Message) -> Message:
    """Serialise and parse, as between two machines."""
    return message_from_proto(message_to_proto(message))


def reply_with(array: Array, examples: float = 9, **metrics: float) -> Message:
    """A training reply whose tensor `w` is the given array, well-formed otherwise."""
    content = RecordDict(
        {
            "arrays": ArrayRecord({"w": array, "count": encode(EXPECTED["count"])}),
            "metrics": MetricRecord({"examples": examples, "loss": 0.5, **metrics}),
        }
    )
    return Message(content, reply_to=ask())


def raw(data: bytes, stype: str = "numpy.ndarray") -> Array:
    """An array that claims to be the right one, with any bytes."""
    return Array(str(DTYPE), SHAPE, stype, data)


def npy(values: np.ndarray, **kwargs: Any) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, values, **kwargs)
    return stream.getvalue()


def with_header(header: str, body: bytes = bytes(48), version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin1")
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + body


def header(descr: str = "'<f4'", order: str = "False", shape: str = "(3, 4)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


def refused(message: Message, expected: Mapping[str, np.ndarray] = EXPECTED) -> str:
    with pytest.raises(RefusedReply) as caught:
        read_train_reply(message, expected)
    return str(caught.value)


VALID = npy(update()["w"])
