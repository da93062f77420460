"""Upper bounds on a reply: the number of records, entries and characters, and the size of numbers.

Flower passes on everything that a node sends: any records, lists and texts of any length, and a message
type and round that the node wrote itself. `check_reply` runs before anything is read. It looks at types
and lengths only, so refusing a million entries costs no more than counting them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord

from layerfed.exchange.arrays import RefusedReply

__all__ = ["MAX_STATISTIC", "MAX_UPDATE", "check_reply", "check_values", "number", "row_of"]

# The records of a reply, by the type of the message that it answers; `layers` may come with each.
RECORDS: Mapping[str, frozenset[str]] = {
    "query.describe": frozenset({"metrics"}),
    "query.probe": frozenset({"metrics", "statistics"}),
    "train": frozenset({"metrics", "arrays"}),
    "evaluate": frozenset({"metrics"}),
    # Secure aggregation's own, see `layerfed/secure/messages.py`.
    "query.keys": frozenset({"secure"}),
    "query.shares": frozenset({"secure"}),
    "query.unmask": frozenset({"secure"}),
}
LAYERS = "layers"
# In a train message, the beginning of the keys of what is to be measured after training.
AFTER = "probe-"
TYPES = {
    "metrics": MetricRecord,
    "statistics": MetricRecord,
    "arrays": ArrayRecord,
    "secure": ConfigRecord,
    LAYERS: ConfigRecord,
}
# Ten times the entries of LayerFed's own records, with room for metrics of a user's own.
MAX_ENTRIES = 1_000
# No model has more tensors or layer versions.
MAX_ARRAYS = MAX_ITEMS = 100_000
# Digests, layer names, and the identity of a store are far shorter.
MAX_TEXT = 1_000
# No gradient of finite float32 numbers comes near. Sums of larger numbers over clients could overflow.
MAX_STATISTIC = 1e100
# No step of training comes near. The squares of larger numbers overflow float32, in which server
# optimisers keep them, and larger integers are not exact in float64.
MAX_UPDATE = 1e15


def check_reply(reply: Message, asked: Message) -> None:
    """Refuse a message that is no reply to an instruction, or exceeds the bounds of one.

    Parameters
    ----------
    reply : flwr.app.Message
        A message without an error.
    asked : flwr.app.Message
        The instruction.

    Raises
    ------
    RefusedReply
        If it comes from another node, has another type or round, or has records, entries, lists or
        texts beyond the bounds.
    """
    theirs, ours = reply.metadata, asked.metadata
    if theirs.src_node_id != ours.dst_node_id:
        raise RefusedReply(f"it was sent by node {theirs.src_node_id}, which was not asked")
    if theirs.message_type != ours.message_type:
        raise RefusedReply(f"it answers '{theirs.message_type}' and not '{ours.message_type}'")
    if theirs.group_id != ours.group_id:
        raise RefusedReply(f"it belongs to round '{theirs.group_id}', not to {ours.group_id}")
    allowed = RECORDS[ours.message_type] | {LAYERS}
    if f"{AFTER}statistics" in asked.content.config_records.get("config", {}):
        allowed |= {"statistics"}
    for name, record in reply.content.items():
        if name not in allowed or not isinstance(record, TYPES[name]):
            raise RefusedReply(f"it holds a record '{name}' that does not belong there")
        _check_record(name, record)


def _check_record(name: str, record: ArrayRecord | ConfigRecord | MetricRecord) -> None:
    most = MAX_ARRAYS if isinstance(record, ArrayRecord) else MAX_ENTRIES
    if len(record) > most:
        raise RefusedReply(
            f"its record '{name}' has {len(record)} entries, {most} at most are read"
        )
    if isinstance(record, ArrayRecord):
        return
    total = 0
    for key, value in record.items():
        items = value if isinstance(value, list) else [value]
        total += len(items)
        if total > MAX_ITEMS:
            raise RefusedReply(f"its record '{name}' lists more than {MAX_ITEMS} items")
        # Flower's lists are of one type.
        texts = [key, *items] if items and isinstance(items[0], str | bytes) else [key]
        if any(len(text) > MAX_TEXT for text in texts):
            raise RefusedReply(
                f"its record '{name}' holds a text of more than {MAX_TEXT} characters"
            )


def number(value: float) -> float:
    """Return a number of a record as a float; infinity if it is too large."""
    try:
        return float(value)
    except OverflowError:  # Python's integers have no largest
        return math.inf


def row_of(value: Any, num_blocks: int, what: str) -> np.ndarray:
    """Return a list of L non-negative numbers as float64.

    Raises
    ------
    RefusedReply
        If the value is anything else; the message names it by `what`.
    """
    if not isinstance(value, list) or len(value) != num_blocks:
        raise RefusedReply(f"its {what} is not a list of {num_blocks} numbers")
    row = np.array([number(x) for x in value], dtype=np.float64)
    if not np.isfinite(row).all() or (row < 0).any():
        raise RefusedReply(f"its {what} holds negative or non-finite numbers")
    if (row > MAX_STATISTIC).any():
        raise RefusedReply(f"its {what} holds {row.max():g}, which is too large")
    return row


def check_values(name: str, values: np.ndarray) -> None:
    """Refuse a tensor of an update with elements that no training gives.

    Raises
    ------
    RefusedReply
        If an element is NaN, infinite, or larger than `MAX_UPDATE`.
    """
    # Two reductions make no copy, and NaN is the result of both.
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if not math.isfinite(low + high):
        raise RefusedReply(f"'{name}' holds NaN or Inf")
    if max(-low, high) > MAX_UPDATE:
        worst = low if -low > high else high
        raise RefusedReply(f"'{name}' holds {worst:g}, which no training gives")
