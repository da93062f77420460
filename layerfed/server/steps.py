"""The steps of updates on the server, one after the other.

A round holds a list of steps, and each `Arrival` goes through all of them. The first step reads the
reply; the others change the update or its weight. A step may also exchange messages before and after
training, and change the sums before they become new layers. Differential privacy (`private.py`) and
secure sums (`secure_sums.py`) are steps like reading and clipping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from logging import INFO
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from flwr.app import ArrayRecord, Message
from flwr.common.logger import log

from layerfed.config import ConfigError
from layerfed.exchange import CODECS, Codec, RefusedReply, TrainInstruction, read_train_reply
from layerfed.exchange.clipping import clipped
from layerfed.models.placement import HEAD
from layerfed.runs.records import RoundRecord

if TYPE_CHECKING:
    from layerfed.server.round import Round

__all__ = ["Arrival", "CappedWeights", "Clipping", "Decoding", "ServerStep", "check_steps"]

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

    single: ClassVar[bool] = False
    """Whether it needs single updates: it changes them, or their weights."""
    last: ClassVar[bool] = False
    """Whether no step may follow that changes updates or weights, and updates must be summed."""

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


def check_steps(steps: Sequence[ServerStep], rule: str) -> None:
    """Refuse a list of steps that would not do what they promise.

    Parameters
    ----------
    steps : Sequence[ServerStep]
    rule : str
        The aggregation's.

    Raises
    ------
    ConfigError
        Naming the steps.
    """
    names = [type(step).__name__ for step in steps]
    readers = [name for name, step in zip(names, steps, strict=True) if step.reads]
    if readers != names[:1]:
        raise ConfigError(f"steps = {', '.join(names)}: one step reads replies, and it comes first")
    if not isinstance(steps[0], Decoding) and (single := [s for s in steps if s.single]):
        raise ConfigError(
            f"{type(single[0]).__name__} does not go with {names[0]}, which sees no single update"
        )
    for place, step in enumerate(steps):
        after = [type(s).__name__ for s in steps[place + 1 :] if s.single]
        if step.last and (after or rule != "mean"):
            raise ConfigError(
                f"{names[place]} bounds what one client adds to a sum: "
                + (f"{after[0]} must not come after it" if after else f"'{rule}' has no sums")
            )


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

    A client that was out of time sends fewer of them, or none; backward reaches the head first.

    This looks at names only. Reading the reply then checks that those layers are whole.
    """
    asked, upload = arrival.asked, arrival.instruction.upload
    late = arrival.instruction.deadline > 0
    if upload is None and not late:
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
    blocks = [name for name in asked if name != HEAD]
    count = len(blocks) if upload is None else min(upload.count, len(blocks))
    rest = asked.keys() - blocks
    if late and (not found or (rest <= found.keys() and len(found) <= count + len(rest))):
        return found
    if not rest <= found.keys() or len(found) != count + len(rest):
        raise RefusedReply(
            f"it holds {', '.join(found) or 'no layer'}; {count} of the blocks it trained"
            f"{' and the head' * len(rest)} are due"
        )
    return found


@dataclass(frozen=True)
class Clipping(ServerStep):
    """Scales an update down if its norm, over all sent layers, exceeds a bound (`server.clip`)."""

    single: ClassVar[bool] = True
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

    single: ClassVar[bool] = True
    most: int

    def weigh(self, examples: int) -> int:
        """Return the number of examples, at most `most`."""
        return min(examples, self.most)
