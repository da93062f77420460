"""`TrainInstruction`: the masks that one client trains, and how it sends its update; and `Probe`.

The server builds it once, and the client parses it once; the due content of the reply follows from it.
Most clients train one mask and send all of it. A client with a *schedule* trains several masks in turn
and sends their union. A client may be told to send only some of its trained blocks: those that the
server names (*sends*), or those that changed most (*upload*). It sends the head in any case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, get_args

import numpy as np
from flwr.app import Message

from layerfed.config import ConfigError
from layerfed.exchange.bounds import AFTER
from layerfed.exchange.change_score import Norm, change_score, highest
from layerfed.exchange.codecs import CODECS, Codec, codec_of
from layerfed.models.factors import of_ranks
from layerfed.models.layers import LayerMap

__all__ = ["Mask", "Probe", "TrainInstruction", "Upload", "read_runs"]

Mask = tuple[bool, ...]
OWN = (
    *("round", "client", "examples", "run", "codec", "lr"),
    *("mask", "schedule", "schedule-steps", "sends", "upload", "upload-norm", "rank"),
    *("personal", "deadline", "runs"),
    *(f"{AFTER}{key}" for key in ("statistics", "batches", "examples-a-batch", "blocks")),
)


@dataclass(frozen=True)
class Probe:
    """What a client is to measure: statistics of some blocks, on some batches of its data.

    Attributes
    ----------
    statistics : tuple[str, ...]
    blocks : Mask
        The blocks that are measured, L booleans; at least one.
    batches : int
        0 stands for the client's whole data.
    examples : int
        The examples in a batch; 0 stands for as many as in training.
    """

    statistics: tuple[str, ...]
    blocks: Mask
    batches: int = 1
    examples: int = 0

    def to_config(self, prefix: str = "") -> dict[str, Any]:
        """Return the entries of a message's `config` record, without blocks if all are measured."""
        entries: dict[str, Any] = {
            "statistics": list(self.statistics),
            "batches": self.batches,
            "examples-a-batch": self.examples,
        }
        if not all(self.blocks):
            entries["blocks"] = [int(on) for on in self.blocks]
        return {f"{prefix}{key}": value for key, value in entries.items()}

    @classmethod
    def read(cls, entries: Mapping[str, Any], num_blocks: int, prefix: str = "") -> Probe:
        """Parse the entries of a message's `config` record.

        Raises
        ------
        ValueError
            If the blocks are no list of L zeros and ones, or none is to be measured.
        """
        blocks: Mask = (True,) * num_blocks
        if (key := f"{prefix}blocks") in entries:
            blocks = _bits(entries[key], key)
        if len(blocks) != num_blocks or not any(blocks):
            raise ValueError(
                f"the server asks for a probe of {sum(blocks)} of {len(blocks)} blocks, this model has "
                f"{num_blocks}"
            )
        batches, examples = (
            entries.get(f"{prefix}{k}", 0) for k in ("batches", "examples-a-batch")
        )
        return cls(tuple(entries[f"{prefix}statistics"]), blocks, batches, examples)


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
        The rule by which the client chooses what it sends.
    config : Mapping[str, Any]
        The other entries of the train config that Flower's `start` got.
    sends : Mask | None
        The trained blocks that the client sends; None sends all, or those that `upload` chooses.
    rank : int | None
        The first ranks of each adapter, which alone the client trains and sends; None means all.
    deadline : float
        Seconds of training, after which the client sends the layers that it has finished; 0: none.
    runs : Mask | None
        The blocks that run; the client's network skips the others. None lets all run.
    probe : Probe | None
        What the client measures after its training, for its next selection.
    """

    round: int
    masks: tuple[Mask, ...]
    steps_each: int = 0
    run: str = ""
    lr: float | None = None
    codec: str = "float32"
    upload: Upload | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    sends: Mask | None = None
    rank: int | None = None
    deadline: float = 0.0
    runs: Mask | None = None
    probe: Probe | None = None

    def __post_init__(self) -> None:
        """Refuse an instruction that no client could follow.

        Raises
        ------
        ValueError
            If there is no mask, masks have different lengths, or blocks are to be sent that are not
            trained, or trained that are skipped.
        """
        if not self.masks or len({len(mask) for mask in self.masks}) > 1:
            raise ValueError("an instruction needs masks over the same layers")
        if self.runs is not None:
            kept = zip(self.mask, self.runs, strict=False)
            if len(self.runs) != len(self.mask) or any(on and not runs for on, runs in kept):
                raise ValueError("the server asks for training of blocks that are to be skipped")
        if self.sends is not None:
            kept = zip(self.sends, self.mask, strict=False)
            if len(self.sends) != len(self.mask) or any(sent and not on for sent, on in kept):
                raise ValueError("the server asks for blocks that the client is not to train")
            if self.upload is not None:
                raise ValueError("either the server or the client chooses the blocks that are sent")

    @property
    def mask(self) -> Mask:
        """The blocks that the client trains in the round, L booleans."""
        return tuple(map(any, zip(*self.masks, strict=True)))

    def codec_for(self, layers: LayerMap) -> Codec:
        """Return the codec named by `codec`, which leaves the model's buffers as they are."""
        return codec_of(self.codec, layers)

    # ------------------------------------------------------------------------------- on the wire
    def to_config(self) -> dict[str, Any]:
        """Return the entries of the message's `config` record, without the round.

        Raises
        ------
        ConfigError
            If a strategy gave several masks and no steps on each.
        """
        if len(self.masks) > 1 and self.steps_each < 1:
            raise ConfigError(
                f"{len(self.masks)} masks to train in turn need steps_each of 1 or more; it is "
                f"{self.steps_each} (set it in `instruct`)"
            )
        entries = {**self.config, "run": self.run, "codec": self.codec}
        entries["mask"] = [int(on) for on in self.mask]
        if self.lr is not None:
            entries["lr"] = self.lr
        if len(self.masks) > 1:
            entries["schedule"] = [int(on) for mask in self.masks for on in mask]
            entries["schedule-steps"] = self.steps_each
        if self.sends is not None:
            entries["sends"] = [int(on) for on in self.sends]
        if self.rank is not None:
            entries["rank"] = self.rank
        if self.runs is not None:
            entries["runs"] = [int(on) for on in self.runs]
        if self.deadline:
            entries["deadline"] = self.deadline
        if self.upload is not None:
            entries |= {"upload": self.upload.count, "upload-norm": self.upload.norm}
        if self.probe is not None:
            entries |= self.probe.to_config(AFTER)
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
            If an entry is missing or has a value that none can have, the masks are not over L layers, or
            the schedule's union is not the mask.
        """
        entries: dict[str, Any] = dict(message.content.config_records["config"])
        mask = _bits(entries.get("mask"), "mask")
        if len(mask) != num_blocks:
            raise ValueError(
                f"the server sent a mask over {len(mask)} layers, this model has {num_blocks}"
            )
        masks: tuple[Mask, ...] = (mask,)
        each = 0
        if "schedule" in entries:
            flat, each = _bits(entries["schedule"], "schedule"), entries.get("schedule-steps", 0)
            if each < 1 or not flat or len(flat) % num_blocks:
                raise ValueError(
                    f"the server sent a schedule of {len(flat)} entries, one mask every {each} steps; "
                    f"a model of {num_blocks} layers needs another"
                )
            masks = tuple(flat[r : r + num_blocks] for r in range(0, len(flat), num_blocks))
        codec = str(entries.get("codec", "float32"))
        if codec not in CODECS:
            raise ValueError(f"the server asks for codec '{codec}'; known are {', '.join(CODECS)}")
        upload = None
        if "upload" in entries:
            count, norm = entries["upload"], entries.get("upload-norm")
            if norm not in get_args(Norm) or not 1 <= count <= sum(mask):
                raise ValueError(
                    f"the server asks for {count} of {sum(mask)} trained blocks by norm '{norm}'"
                )
            upload = Upload(int(count), cast(Norm, norm))
        lr = entries.get("lr")
        if lr is not None and not (isinstance(lr, int | float) and 0 < lr < math.inf):
            raise ValueError(f"the server sent a learning rate of {lr!r}")
        rank = entries.get("rank")
        if rank is not None and not (isinstance(rank, int) and rank > 0):
            raise ValueError(f"the server asks for {rank!r} ranks of each adapter")
        deadline = entries.get("deadline", 0.0)
        if not (isinstance(deadline, int | float) and 0 <= deadline < math.inf):
            raise ValueError(f"the server sent a deadline of {deadline!r} seconds")
        found = cls(
            round=int(entries["round"]),
            masks=masks,
            steps_each=each,
            run=str(entries.get("run", "")),
            lr=lr,
            codec=codec,
            sends=_bits(entries["sends"], "sends") if "sends" in entries else None,
            upload=upload,
            rank=rank,
            deadline=deadline,
            runs=read_runs(entries),
            probe=Probe.read(entries, num_blocks, AFTER)
            if f"{AFTER}statistics" in entries
            else None,
            config={key: value for key, value in entries.items() if key not in OWN},
        )
        if found.mask != mask:
            raise ValueError("the masks of the server's schedule together are not its mask")
        return found

    def asked(self, layers: LayerMap) -> list[str]:
        """Return the layers that the client may send: those that it trains, or those that are named.

        Those that are personal are not among them.
        """
        named = layers.trained(self.mask if self.sends is None else self.sends)
        return [name for name in named if name not in layers.personal]

    def part(self, tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Return what the client trains of some tensors: its ranks of each adapter."""
        if self.rank is None:
            return tensors
        ranks = {name: of_ranks(name, slice(self.rank)) for name in tensors}
        return {name: x[ranks[name]].copy() if ranks[name] else x for name, x in tensors.items()}

    def share(self, layers: LayerMap) -> float:
        """Return the part of each adapter that the client trains."""
        return 1.0 if self.rank is None else self.rank / layers.rank

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
        """Return the layers that a client sends: those that are asked for, or those that changed most.

        Parameters
        ----------
        layers : LayerMap
        update : Mapping[str, numpy.ndarray]
            Δ_i by tensor. A client that is out of time has none of some layers.
        """
        asked = [n for n in self.asked(layers) if all(t in update for t in layers[n].sent)]
        if self.upload is None or not asked:
            return asked
        blocks = [name for name in asked if name != layers.head.name]
        scores = {
            name: change_score((update[p] for p in layers[name].parameters), self.upload.norm)
            for name in blocks
        }
        return [*highest(scores, self.upload.count), *asked[len(blocks) :]]

    # ------------------------------------------------------------------------------ on the server
    def whole(
        self, update: Mapping[str, np.ndarray], like: Mapping[str, np.ndarray]
    ) -> Mapping[str, np.ndarray]:
        """Return an update with zeros in the ranks that the client did not train.

        Parameters
        ----------
        update : Mapping[str, numpy.ndarray]
        like : Mapping[str, numpy.ndarray]
            Tensors of the model, for their shapes.
        """
        if self.rank is None:
            return update
        found = {name: np.zeros(like[name].shape, x.dtype) for name, x in update.items()}
        for name, values in update.items():
            found[name][of_ranks(name, slice(self.rank))] = values
        return found

    def layer_steps(self, layers: LayerMap, steps: float) -> dict[str, float]:
        """Return the number of steps in which each block moved, for a client that states `steps`.

        The number is at least one, whatever the client states.
        """
        masks, each = np.array(self.masks), self.steps_each or steps
        made = np.clip(steps - each * np.arange(len(masks)), 0.0, each)
        moved = np.maximum(made @ masks, 1.0)
        return {block.name: float(n) for block, n in zip(layers.blocks, moved, strict=True)}


def _bits(entry: Any, name: str) -> Mask:
    """Return an entry as booleans: it must be a list of zeros and ones."""
    if not isinstance(entry, list) or not all(bit in (0, 1) for bit in entry):
        raise ValueError(f"the server sent no '{name}' of zeros and ones")
    return tuple(bool(bit) for bit in entry)


def read_runs(entries: Mapping[str, Any]) -> Mask | None:
    """Return the blocks that run, from a message's `config` record; None lets all run.

    Raises
    ------
    ValueError
        If they are no list of zeros and ones.
    """
    return _bits(entries["runs"], "runs") if "runs" in entries else None


def train_config(config: Mapping[str, Any]) -> tuple[float | None, dict[str, Any]]:
    """Split Flower's train config into η, None if it has none, and the rest.

    Raises
    ------
    ConfigError
        If `lr` is no number above 0.
    """
    rest = {key: value for key, value in config.items() if key not in OWN}
    lr = config.get("lr")
    number = isinstance(lr, int | float) and not isinstance(lr, bool)
    if lr is not None and not (number and 0 < lr < math.inf):
        raise ConfigError(f"the train config's lr = {lr!r} is not allowed: a number above 0 is")
    return (None if lr is None else float(lr)), rest


def as_masks(rows: np.ndarray | Sequence[Sequence[bool]]) -> tuple[Mask, ...]:
    """Return masks, shape (S, L), as tuples."""
    return tuple(tuple(bool(on) for on in row) for row in rows)
