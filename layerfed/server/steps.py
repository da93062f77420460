"""The steps of updates on the server, one after the other.

A round holds a list of steps, and each `Arrival` goes through all of them. The first step reads the
reply; the others change the update or its weight. A step may also exchange messages before and after
training, and change the sums before they become new layers. Differential privacy (`private.py`) and
secure sums (`secure_sums.py`) are steps like reading and clipping.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from logging import INFO
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from flwr.app import ArrayRecord, Message
from flwr.common.logger import log

from layerfed.exchange import CODECS, Codec, RefusedReply, TrainInstruction, read_train_reply
from layerfed.exchange.clipping import clipped
from layerfed.runs.records import RoundRecord

if TYPE_CHECKING:
    from layerfed.server.round import Round

__all__ = ["Arrival", "CappedWeights", "Clipping", "Decoding", "ServerStep"]

Layers = Mapping[str, Mapping[str, np.ndarray]]


@dataclass
class Arrival:
    """One client's training reply on its way into the mean.

    Attributes
    ----------
    client : int
        Partition id.
    message : flwr.app.Message
    instruction : TrainInstruction
        The instruction that the client got.
    asked : Mapping[str, Mapping[str, numpy.ndarray]]
        θ^t of the layers that it was asked to train, by layer and tensor; the head comes last.
    stated : int
        d_i as the client stated it when it joined.
    codec : Codec
        What the update was to be written in.
    due : Mapping[str, Mapping[str, numpy.ndarray]]
        The asked layers whose updates the reply holds.
    update : Mapping[str, numpy.ndarray]
        Δ_i by tensor; empty in a secure sum, where only the sum will be known.
    examples : int
        The client's weight.
    metrics : Mapping[str, float]
    measured : bool
        Whether E2 may use the norm of this update.
    """

    client: int
    message: Message
    instruction: TrainInstruction
    asked: Layers
    stated: int
    codec: Codec = CODECS["float32"]
    due: Layers = field(default_factory=dict)
    update: Mapping[str, np.ndarray] = field(default_factory=dict)
    examples: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    measured: bool = True


class ServerStep:
    """One step. Its methods do nothing by default; a subclass overrides those that it needs."""

    reads: ClassVar[bool] = False
    """Whether `receive` reads the reply; exactly one step of a list does."""

    def before_training(self, round: Round, messages: list[Message]) -> list[Message]:
        """Prepare the round before anyone trains; return the instructions that are to be sent."""
        return messages

    def receive(self, arrival: Arrival, record: RoundRecord) -> None:
        """Read, check or change one client's update.

        Raises
        ------
        RefusedReply
            If the update must not be used.
        """

    def weigh(self, examples: int) -> int:
        """Return the number of examples that a client with `examples` counts as."""
        return examples

    def after_training(self, round: Round) -> None:
        """Complete the sum once all updates have arrived."""

    def close(self, sums: Mapping[str, np.ndarray], record: RoundRecord) -> None:
        """Change the sums of updates, in place, by tensor."""

    def record(self, record: RoundRecord) -> None:
        """Add to the record of a finished round, before observers see it."""


class Decoding(ServerStep):
    """Reads an update in the clear: checks it in full and decodes it."""

    reads = True

    def receive(self, arrival: Arrival, record: RoundRecord) -> None:
        """Read the reply into `due`, `update`, `examples` and `metrics`."""
        arrival.due = _sent(arrival)
        expected = {t: v for tensors in arrival.due.values() for t, v in tensors.items()}
        reply = read_train_reply(arrival.message, expected, arrival.codec)
        if reply.examples > arrival.stated:
            raise RefusedReply(
                f"it claims {reply.examples} examples, and had {arrival.stated} on joining"
            )
        arrival.update, arrival.metrics = reply.update, reply.metrics
        arrival.examples = reply.examples


def _sent(arrival: Arrival) -> Layers:
    """Return the layers whose updates are due: all asked ones, or those that the client chose.

    This looks at names only. Reading the reply then checks that those layers are whole.
    """
    asked, upload = arrival.asked, arrival.instruction.upload
    if upload is None:
        return asked
    record = arrival.message.content.array_records.get("arrays", ArrayRecord())
    found = {
        layer: tensors
        for layer, tensors in asked.items()
        if any(
            part in record
            for name, like in tensors.items()
            for part in arrival.codec.parts_of(name, like)
        )
    }
    *_, head = asked
    if head not in found or len(found) != upload.count + 1:
        raise RefusedReply(
            f"it holds {', '.join(found) or 'no layer'}; {upload.count} of the blocks it trained and "
            "the head are due"
        )
    return found


@dataclass(frozen=True)
class Clipping(ServerStep):
    """Scales an update down if its norm, over all sent layers, exceeds a bound (`server.clip`)."""

    bound: float

    def receive(self, arrival: Arrival, record: RoundRecord) -> None:
        """Clip the update, and count it if it was clipped."""
        arrival.update, norm = clipped(arrival.update, self.bound)
        record.clipped += norm > self.bound

    def close(self, sums: Mapping[str, np.ndarray], record: RoundRecord) -> None:
        """Log the number of clipped updates."""
        if record.clipped:
            log(
                INFO,
                "round %d: %d of %d updates were scaled down to a norm of %g (server.clip)",
                record.round,
                record.clipped,
                record.replies,
                self.bound,
            )


@dataclass(frozen=True)
class CappedWeights(ServerStep):
    """Limits the number of examples that a client counts as (`federation.max-examples`)."""

    most: int

    def weigh(self, examples: int) -> int:
        """Return the number of examples, at most `most`."""
        return min(examples, self.most)
