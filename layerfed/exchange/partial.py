"""Training instructions beyond one mask: layers that change within a round, layers that are not sent.

A client that is asked for an *upload* of k blocks trains its whole mask and chooses itself which k it
sends, with the head. One that is given a *schedule* trains several masks one after the other, so many
steps each; its `mask` is their union, and all of it is sent.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import ArrayRecord, Message

from layerfed.exchange.arrays import RefusedReply
from layerfed.exchange.change_score import Norm
from layerfed.exchange.codecs import Codec
from layerfed.exchange.messages import read_config, read_mask
from layerfed.models.layers import LayerMap

__all__ = [
    "layer_steps",
    "read_schedule",
    "read_upload",
    "read_uploaded",
    "scheduled",
    "upload_of",
]


def scheduled(masks: np.ndarray, steps: int) -> dict[str, list[int] | int]:
    """Return the settings by which a client trains masks, shape (S, L), for so many steps each."""
    return {"schedule": masks.astype(int).ravel().tolist(), "schedule-steps": steps}


def read_schedule(
    message: Message, layers: LayerMap, steps: int
) -> list[tuple[tuple[bool, ...], int]]:
    """Return what a train instruction wants trained one after the other: masks, and steps on each.

    Parameters
    ----------
    message : Message
    layers : LayerMap
    steps : int
        All the steps that the client makes.

    Raises
    ------
    ValueError
        If the schedule is not one for this model and these steps, or its masks together are not the
        instruction's mask.
    """
    config, mask = read_config(message), read_mask(message, layers)
    if "schedule" not in config:
        return [(mask, steps)]
    each, flat = config["schedule-steps"], np.array(config["schedule"], dtype=bool)
    if each < 1 or flat.size != -(-steps // each) * layers.num_blocks:
        raise ValueError(
            f"the server sent a schedule of {flat.size} entries, one mask every {each} steps; "
            f"{steps} steps on a model of {layers.num_blocks} layers need another"
        )
    masks = flat.reshape(-1, layers.num_blocks)
    if masks.any(axis=0).tolist() != list(mask):
        raise ValueError("the masks of the server's schedule together are not its mask")
    return [
        (tuple(bool(m) for m in row), min(each, steps - start))
        for row, start in zip(masks, range(0, steps, each), strict=True)
    ]


def layer_steps(message: Message, layers: LayerMap, steps: float) -> dict[str, float]:
    """Return in how many steps each block moved on a client that made so many, by its instruction.

    At least one, whatever the client claims.
    """
    config, mask = read_config(message), read_mask(message, layers)
    masks, each = np.array([mask]), steps
    if "schedule" in config:
        masks = np.array(config["schedule"], dtype=bool).reshape(-1, layers.num_blocks)
        each = config["schedule-steps"]
    made = np.clip(steps - each * np.arange(len(masks)), 0.0, each)
    moved = np.maximum(made @ masks, 1.0)
    return {block.name: float(n) for block, n in zip(layers.blocks, moved, strict=True)}


def upload_of(count: int, norm: Norm) -> dict[str, int | str]:
    """Return the settings by which a client sends its most changed blocks only, so many of them."""
    return {"upload": count, "upload-norm": norm}


def read_upload(message: Message) -> tuple[int, Norm] | None:
    """Return how many of the trained blocks to send, and the norm of their scores; None for all."""
    config = read_config(message)
    return (int(config["upload"]), config["upload-norm"]) if "upload" in config else None


def read_uploaded(
    message: Message, asked: Mapping[str, Mapping[str, np.ndarray]], count: int, codec: Codec
) -> list[str]:
    """Return which of the layers that it was asked to train a client chose to send.

    Only names are looked at here; `read_train_reply` then sees to it that those layers are whole.

    Parameters
    ----------
    message : Message
        A training reply.
    asked : Mapping[str, Mapping[str, numpy.ndarray]]
        The global tensors by layer, the head last.
    count : int
        How many blocks are due, besides the head.
    codec : Codec

    Raises
    ------
    RefusedReply
        If it holds another number of blocks, or no head.
    """
    record = message.content.array_records.get("arrays", ArrayRecord())
    found = [
        layer
        for layer, tensors in asked.items()
        if any(
            part in record for name, like in tensors.items() for part in codec.parts_of(name, like)
        )
    ]
    *_, head = asked
    if head not in found or len(found) != count + 1:
        raise RefusedReply(
            f"it holds {', '.join(found) or 'no layer'}; {count} of the blocks it trained and the head "
            "are due"
        )
    return found
