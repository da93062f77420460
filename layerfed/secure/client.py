"""A client's part in secure sums, as Flower handlers and a mod."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from logging import WARNING
from typing import Any, cast

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.logger import log

from layerfed.config import NodeConfig
from layerfed.secure.fixed_point import FixedPoint
from layerfed.secure.messages import answer, masked_reply, read_secure, tensors_of
from layerfed.secure.participant import Participant

__all__ = ["add_secure_sums", "masking"]

# In Flower's context, since each message may find another process.
STATE = "secure-sum"


def add_secure_sums(app: ClientApp) -> None:
    """Let a ClientApp answer the questions of a secure sum; `masking` must be the first of its mods."""
    app.query("keys")(_keys)
    app.query("shares")(_shares)
    app.query("unmask")(_unmask)


def _keys(message: Message, context: Context) -> Message:
    """Begin a round with fresh secrets; those of a round that was broken off are forgotten."""
    own = NodeConfig.read(context.node_config).partition_id
    mine = Participant(_asked(message)["purpose"], own)
    _keep(context, mine)
    return answer(message, **asdict(mine.keys()))


def _shares(message: Message, context: Context) -> Message:
    """Share this client's secrets among the clients of the round."""
    asked = _asked(message)
    mine = _kept(context, asked)
    sealed = mine.share_secrets(
        asked["threshold"], asked["clients"], asked["sealing"], asked["masking"]
    )
    _keep(context, mine)
    return answer(message, sealed=sealed)


def _unmask(message: Message, context: Context) -> Message:
    """Reveal a share for each peer, once: the secrets are forgotten."""
    asked = _asked(message)
    shares = _kept(context, asked).reveal(asked["survivors"])
    del context.state[STATE]
    return answer(message, shares=shares)


def masking(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Mask the update of a training reply, where its instruction is part of a secure sum (a mod).

    It comes first of all mods, so that what others do to an update is done before it is hidden.
    """
    reply = call_next(message, context)
    asked = read_secure(message)
    # A reply without an update says which layers are missing; the instruction comes again.
    if message.metadata.message_type != "train" or asked is None or _without_update(reply):
        return reply
    mine = _kept(context, asked)
    arrays = reply.content.array_records["arrays"]
    examples = int(cast(float, reply.content.metric_records["metrics"]["examples"]))
    point = FixedPoint(asked["limit"], asked["scale"])
    vector, cut = point.encode(tensors_of(arrays), examples)
    if cut:
        log(
            WARNING,
            "client %d: %d of %d coordinates of its update exceed secagg.range = %g, and were clipped",
            mine.own,
            cut,
            vector.size - 1,
            point.limit,
        )
    mine.mask(vector, asked["peers"], asked["sealed"])
    _keep(context, mine)
    masked_reply(reply, vector)
    return reply


def _without_update(reply: Message) -> bool:
    return reply.has_error() or "arrays" not in reply.content.array_records


def _asked(message: Message) -> Mapping[str, Any]:
    asked = read_secure(message)
    if asked is None:
        raise ValueError(f"the server's '{message.metadata.message_type}' says nothing of a sum")
    return asked


def _keep(context: Context, mine: Participant) -> None:
    context.state[STATE] = ConfigRecord(asdict(mine))


def _kept(context: Context, asked: Mapping[str, Any]) -> Participant:
    """Return what this client keeps of the sum it is asked about, and of no other round's."""
    record = context.state.config_records.get(STATE)
    if record is None or record["purpose"] != asked["purpose"]:
        raise ValueError("this node has no keys for this secure sum; was it restarted meanwhile?")
    return Participant(**cast(dict[str, Any], dict(record)))
