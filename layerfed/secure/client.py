"""A client's part in secure sums: the handlers of Flower's messages, and the padding of an update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from logging import WARNING
from typing import Any, cast

import numpy as np
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.common.logger import log

from layerfed.config import NodeConfig
from layerfed.secure.fixed_point import FixedPoint
from layerfed.secure.messages import PADDED, answer, read_secure
from layerfed.secure.participant import Participant

__all__ = ["add_secure_sums", "pad_update"]

# Kept in Flower's context, since another process may handle the next message.
STATE = "secure-sum"


def add_secure_sums(app: ClientApp) -> None:
    """Let a ClientApp answer the questions of a secure sum."""
    app.query("keys")(_keys)
    app.query("shares")(_shares)
    app.query("unmask")(_unmask)


def _keys(message: Message, context: Context) -> Message:
    """Begin a round with new secrets, and forget those of a round that was broken off."""
    own = NodeConfig.read(context.node_config).partition_id
    mine = Participant(_asked(message)["purpose"], own)
    _keep(context, mine)
    return answer(message, **asdict(mine.keys()))


def _shares(message: Message, context: Context) -> Message:
    """Answer with shares of this client's secrets, sealed for the clients of the round."""
    asked = _asked(message)
    mine = _kept(context, asked)
    sealed = mine.share_secrets(
        asked["threshold"], asked["clients"], asked["sealing"], asked["masking"]
    )
    _keep(context, mine)
    return answer(message, sealed=sealed)


def _unmask(message: Message, context: Context) -> Message:
    """Reveal a share for each peer, and forget the secrets: a client does this once."""
    asked = _asked(message)
    shares = _kept(context, asked).reveal(asked["survivors"])
    del context.state[STATE]
    return answer(message, shares=shares)


def pad_update(
    message: Message, context: Context, update: Mapping[str, np.ndarray], examples: int
) -> dict[str, np.ndarray]:
    """Return an update and the number of examples as one padded vector of integers.

    Parameters
    ----------
    message : flwr.app.Message
        The train instruction of a secure sum.
    context : flwr.app.Context
    update : Mapping[str, numpy.ndarray]
        Δ_i by tensor.
    examples : int
        d_i.
    """
    asked = _asked(message)
    mine = _kept(context, asked)
    point = FixedPoint(asked["limit"], asked["scale"])
    vector, cut = point.encode([update[name] for name in sorted(update)], examples)
    if cut:
        log(
            WARNING,
            "client %d: %d of %d coordinates of its update exceed secagg.range = %g, and were clipped",
            mine.own,
            cut,
            vector.size - 1,
            point.limit,
        )
    mine.pad(vector, asked["peers"], asked["sealed"])
    _keep(context, mine)
    return {PADDED: vector}


def _asked(message: Message) -> Mapping[str, Any]:
    asked = read_secure(message)
    if asked is None:
        raise ValueError(f"the server's '{message.metadata.message_type}' names no secure sum")
    return asked


def _keep(context: Context, mine: Participant) -> None:
    context.state[STATE] = ConfigRecord(asdict(mine))


def _kept(context: Context, asked: Mapping[str, Any]) -> Participant:
    """Return this client's secrets of the sum it is asked about; those of another round are refused."""
    record = context.state.config_records.get(STATE)
    if record is None or record["purpose"] != asked["purpose"]:
        raise ValueError("this node has no keys for this secure sum; was it restarted meanwhile?")
    return Participant(**cast(dict[str, Any], dict(record)))
