"""`TrainInstruction`: the masks that one client trains, and how it sends its update.

The server builds it once, and the client parses it once; the due content of the reply follows from it.
Most clients train one mask and send all of it. A client with a *schedule* trains several masks in turn
and sends their union. A client with an *upload* rule trains its whole mask, and sends the blocks that
changed most and the head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message

from layerfed.exchange.change_score import Norm, change_score, highest
from layerfed.exchange.codecs import CODECS, Codec
from layerfed.models.layers import LayerMap

__all__ = ["Mask", "TrainInstruction", "Upload"]

Mask = tuple[bool, ...]
OWN = (
    *("round", "client", "examples", "run", "codec", "lr"),
    *("mask", "schedule", "schedule-steps", "upload", "upload-norm"),
)


@dataclass(frozen=True)
class Upload:
    """The rule to send the head and the `count` trained blocks with the highest change scores."""

    count: int
    norm: Norm


@dataclass(frozen=True)
class TrainInstruction:
    """One client's instruction for one round: what it trains, and how it sends its update.

    Attributes
    ----------
    round : int
        t, from 1.
    masks : tuple[Mask, ...]
        The masks that the client trains one after the other, L booleans each; mostly one, m_i.
    steps_each : int
        Local steps on each of several masks; the last mask gets the remaining steps.
    run : str
        A name of the run, under which a client keeps state between rounds (error feedback).
    lr : float | None
        η; None if the client has its own.
    codec : {"float32", "float16", "bfloat16", "int8"}
    upload : Upload | None
        None sends all trained layers.
    config : Mapping[str, Any]
        The other entries of the train config that Flower's `start` got.
    """

    round: int
    masks: tuple[Mask, ...]
    steps_each: int = 0
    run: str = ""
    lr: float | None = None
    codec: str = "float32"
    upload: Upload | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mask(self) -> Mask:
        """The blocks that the client trains in the round, L booleans."""
        return tuple(map(any, zip(*self.masks, strict=True)))

    def codec_for(self, layers: LayerMap) -> Codec:
        """Return the codec named by `codec`, which leaves the model's buffers as they are."""
        return CODECS[self.codec].sparing(b for layer in layers.layers for b in layer.buffers)

    # ------------------------------------------------------------------------------- on the wire
    def to_config(self) -> dict[str, Any]:
        """Return the entries of the message's `config` record, without the round."""
        entries = {**self.config, "run": self.run, "codec": self.codec}
        entries["mask"] = [int(on) for on in self.mask]
        if self.lr is not None:
            entries["lr"] = self.lr
        if len(self.masks) > 1:
            entries["schedule"] = [int(on) for mask in self.masks for on in mask]
            entries["schedule-steps"] = self.steps_each
        if self.upload is not None:
            entries |= {"upload": self.upload.count, "upload-norm": self.upload.norm}
        return entries

    @classmethod
    def read(cls, message: Message, num_blocks: int) -> TrainInstruction:
        """Parse a train message.

        Parameters
        ----------
        message : flwr.app.Message
        num_blocks : int
            L of the client's model.

        Raises
        ------
        ValueError
            If the masks are not over L layers, the schedule's union is not the mask, or the codec is
            unknown.
        """
        entries: dict[str, Any] = dict(message.content.config_records["config"])
        mask = tuple(bool(on) for on in entries["mask"])
        if len(mask) != num_blocks:
            raise ValueError(
                f"the server sent a mask over {len(mask)} layers, this model has {num_blocks}"
            )
        masks: tuple[Mask, ...] = (mask,)
        each = 0
        if "schedule" in entries:
            flat, each = entries["schedule"], int(entries["schedule-steps"])
            if each < 1 or not flat or len(flat) % num_blocks:
                raise ValueError(
                    f"the server sent a schedule of {len(flat)} entries, one mask every {each} steps; "
                    f"a model of {num_blocks} layers needs another"
                )
            rows = range(0, len(flat), num_blocks)
            masks = tuple(tuple(bool(on) for on in flat[r : r + num_blocks]) for r in rows)
        codec = str(entries.get("codec", "float32"))
        if codec not in CODECS:
            raise ValueError(f"the server asks for codec '{codec}'; known are {', '.join(CODECS)}")
        upload = None
        if "upload" in entries:
            upload = Upload(int(entries["upload"]), entries["upload-norm"])
        found = cls(
            round=int(entries["round"]),
            masks=masks,
            steps_each=each,
            run=str(entries.get("run", "")),
            lr=entries.get("lr"),
            codec=codec,
            upload=upload,
            config={key: value for key, value in entries.items() if key not in OWN},
        )
        if found.mask != mask:
            raise ValueError("the masks of the server's schedule together are not its mask")
        return found

    # -------------------------------------------------------------------------------- on a client
    def schedule(self, steps: int) -> list[tuple[Mask, int]]:
        """Return the masks that a client with `steps` local steps trains in turn, each with its steps.

        Raises
        ------
        ValueError
            If the number of masks does not fit the number of steps.
        """
        if len(self.masks) == 1:
            return [(self.masks[0], steps)]
        if len(self.masks) != -(-steps // self.steps_each):
            raise ValueError(
                f"the server sent a schedule of {len(self.masks)} masks, one every {self.steps_each} "
                f"steps; {steps} steps need another"
            )
        starts = range(0, steps, self.steps_each)
        return [
            (mask, min(self.steps_each, steps - start))
            for mask, start in zip(self.masks, starts, strict=True)
        ]

    def sent(self, layers: LayerMap, update: Mapping[str, np.ndarray]) -> list[str]:
        """Return the trained layers that a client sends: all, or those that changed most.

        Parameters
        ----------
        layers : LayerMap
        update : Mapping[str, numpy.ndarray]
            Δ_i by tensor.
        """
        *blocks, head = layers.trained(self.mask)
        if self.upload is None:
            return [*blocks, head]
        scores = {
            name: change_score((update[p] for p in layers[name].parameters), self.upload.norm)
            for name in blocks
        }
        return [*highest(scores, self.upload.count), head]

    # ------------------------------------------------------------------------------ on the server
    def layer_steps(self, layers: LayerMap, steps: float) -> dict[str, float]:
        """Return the number of steps in which each block moved, for a client that states `steps`.

        The number is at least one, whatever the client states.
        """
        masks, each = np.array(self.masks), self.steps_each or steps
        made = np.clip(steps - each * np.arange(len(masks)), 0.0, each)
        moved = np.maximum(made @ masks, 1.0)
        return {block.name: float(n) for block, n in zip(layers.blocks, moved, strict=True)}


def train_config(config: ConfigRecord | Mapping[str, Any]) -> tuple[float | None, dict[str, Any]]:
    """Split Flower's train config into η and the rest."""
    rest = {key: value for key, value in config.items() if key not in OWN}
    lr = config.get("lr")
    return (float(lr) if isinstance(lr, int | float) else None), rest


def as_masks(rows: np.ndarray | Sequence[Sequence[bool]]) -> tuple[Mask, ...]:
    """Return masks, shape (S, L), as tuples."""
    return tuple(tuple(bool(on) for on in row) for row in rows)
