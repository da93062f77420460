"""The steps of an update on the client, one after the other, between training and sending.

The server's steps (`server/steps.py`) undo or continue these. An update that is encoded here is decoded
there; an update that is padded here is added to a secure sum there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import Message

from layerfed.client.workbench import Node
from layerfed.exchange import TrainInstruction, compress
from layerfed.models.layers import LayerMap
from layerfed.privacy.protection import refuse_buffers
from layerfed.secure.client import pad_update
from layerfed.secure.messages import read_secure

__all__ = ["ClientStep", "Departure", "steps_of"]


@dataclass(frozen=True)
class Departure:
    """An update on its way to the server.

    Attributes
    ----------
    tensors : Mapping[str, numpy.ndarray]
        Δ_i by tensor; after encoding, the arrays to be sent, by name.
    layers : tuple[str, ...]
        The layers that the update holds, the head last.
    examples : int | None
        d_i as stated; None if it is part of a padded vector.
    numbers : Mapping[str, float]
        The metrics that are sent with it.
    """

    tensors: Mapping[str, np.ndarray]
    layers: tuple[str, ...]
    examples: int | None
    numbers: Mapping[str, float] = field(default_factory=dict)


class ClientStep:
    """One step: it takes a departure and returns it changed."""

    def check(self, layers: LayerMap) -> None:
        """Refuse an instruction or a model that this step cannot work with, before training."""

    def __call__(self, departure: Departure, layers: LayerMap) -> Departure:
        """Return the update as it is to be sent on; by default unchanged."""
        return departure


@dataclass(frozen=True)
class Protect(ClientStep):
    """Clips the update and adds noise to it, as the run and the node's owner ask."""

    node: Node
    instruction: TrainInstruction

    def check(self, layers: LayerMap) -> None:
        """Refuse instructions under which the client would reveal more than the noise covers."""
        refuse_buffers(layers)
        if self.instruction.upload is not None:
            raise ValueError(
                "the server asks for the layers that changed most; that choice depends on this "
                "client's data, and its updates are private"
            )

    def __call__(self, departure: Departure, layers: LayerMap) -> Departure:
        """Clip the whole update to one norm, and add the noise."""
        assert self.node.protection is not None
        return replace(departure, tensors=self.node.protection.update(departure.tensors))


@dataclass(frozen=True)
class Choose(ClientStep):
    """Keeps the layers that the instruction asks for: all, or those that changed most."""

    instruction: TrainInstruction

    def __call__(self, departure: Departure, layers: LayerMap) -> Departure:
        """Leave the other layers out."""
        return replace(departure, layers=tuple(self.instruction.sent(layers, departure.tensors)))


@dataclass(frozen=True)
class Encode(ClientStep):
    """Writes the update in the codec that the server asked for."""

    node: Node
    instruction: TrainInstruction

    def __call__(self, departure: Departure, layers: LayerMap) -> Departure:
        """Encode layer by layer, with error feedback if the codec has it."""
        by_layer = {
            name: {t: departure.tensors[t] for t in layers[name].sent} for name in departure.layers
        }
        # Private updates have no error feedback: a remembered error would carry parts of an update
        # into a later round, whose ε does not count them.
        store = None if self.node.protection is not None else self.node.store
        key = f"{self.instruction.run}/{self.node.partition}"
        return replace(
            departure, tensors=compress(self.instruction.codec_for(layers), by_layer, store, key)
        )


@dataclass(frozen=True)
class Pad(ClientStep):
    """Hides the update under the pads of a secure sum."""

    node: Node
    message: Message

    def check(self, layers: LayerMap) -> None:
        """Refuse to send an update in the clear if the run promises to hide it."""
        if self.node.run.secagg.enabled and read_secure(self.message) is None:
            raise ValueError(
                "secagg.enabled = true, but the server asks for an update in the clear"
            )

    def __call__(self, departure: Departure, layers: LayerMap) -> Departure:
        """Replace the update and its number of examples by one padded vector."""
        if read_secure(self.message) is None or departure.examples is None:
            return departure
        vector = pad_update(self.message, self.node.context, departure.tensors, departure.examples)
        return replace(departure, tensors=vector, examples=None)


def steps_of(
    node: Node, instruction: TrainInstruction, message: Message, own: tuple[ClientStep, ...] = ()
) -> list[ClientStep]:
    """Return the steps of one client's update, in order.

    Parameters
    ----------
    node : Node
    instruction : TrainInstruction
    message : flwr.app.Message
    own : tuple[ClientStep, ...]
        Steps of an app of your own; they see the update before it is encoded and padded.
    """
    steps: list[ClientStep] = []
    if node.protection is not None:
        steps.append(Protect(node, instruction))
    return [
        *steps,
        Choose(instruction),
        *own,
        Encode(node, instruction),
        Pad(node, message),
    ]
