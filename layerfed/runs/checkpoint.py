"""Checkpoints, from which a run continues as if it had never stopped.

A checkpoint is a folder `checkpoint/round-000012` in the run folder. It is written beside its place,
flushed to the disk and renamed, so that the last checkpoint is whole however a run is killed. It holds

- `layers.safetensors`: tensors of the layers that differ from the pretrained base;
- `state.safetensors`: arrays of the server's optimiser and of the strategy, by name;
- `state.json`: round, fingerprints of the base and of the data, the run's token, and a digest of each
  file.

Random draws need no state, since each has its own seed from purpose, round and client.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from logging import WARNING
from pathlib import Path

import numpy as np
from flwr.common.logger import log
from safetensors.numpy import load, save

from layerfed.digests import content_digest
from layerfed.files import whole
from layerfed.runs.files import read_json
from layerfed.runs.records import Observer, RoundRecord

__all__ = ["Checkpoint", "Checkpoints", "latest_checkpoint", "save_checkpoint"]

FOLDER = "checkpoint"
LAYERS, STATE, INDEX = "layers.safetensors", "state.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a round.

    Attributes
    ----------
    round : int
        The last finished round.
    base : str
        Fingerprint of the pretrained base.
    run_token : str
        The key under which clients keep their own state of this run.
    layers : Mapping[str, numpy.ndarray]
        Tensors of changed layers, by tensor name.
    state : Mapping[str, numpy.ndarray]
        The state of the server's optimiser and of the strategy, by name.
    data : str
        Fingerprint of the server's data; empty in checkpoints of version 0.1.
    """

    round: int
    base: str
    run_token: str
    layers: Mapping[str, np.ndarray]
    state: Mapping[str, np.ndarray] = field(default_factory=dict)
    data: str = ""


class Checkpoints(Observer):
    """An observer that writes a checkpoint after every k-th round, and when the run ends or is stopped.

    If a checkpoint cannot be written, it logs a warning. The run continues, and older checkpoints stay.

    Parameters
    ----------
    run_folder : Path
    state : Callable[[], Checkpoint]
        Returns the run's present state.
    every : int
        k.
    keep : int
        The number of checkpoints to keep.
    """

    def __init__(
        self, run_folder: Path, state: Callable[[], Checkpoint], every: int, keep: int
    ) -> None:
        self._folder, self._state, self._every, self._keep = run_folder, state, every, keep

    def on_round(self, record: RoundRecord) -> None:
        """Write a checkpoint, if one is due."""
        if record.round % self._every == 0:
            self._save(record)

    def on_end(self, record: RoundRecord) -> None:
        """Write the last checkpoint, unless `on_round` has."""
        if record.round % self._every:
            self._save(record)

    def _save(self, record: RoundRecord) -> None:
        try:
            save_checkpoint(self._folder, self._state(), self._keep)
        except OSError as error:
            log(WARNING, "round %d: no checkpoint could be written: %s", record.round, error)


def save_checkpoint(run_folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint, delete all but the newest `keep`, and return its folder.

    Raises
    ------
    OSError
        If the disk is full or cannot be written. Older checkpoints stay then.
    """
    root = run_folder / FOLDER
    place = root / f"round-{checkpoint.round:06d}"
    with whole(place, flush=True) as beside:
        beside.mkdir(parents=True)
        _fill(beside, checkpoint)
    for old in _found(run_folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def _fill(folder: Path, checkpoint: Checkpoint) -> None:
    digests = {}
    for name, tensors in ((LAYERS, checkpoint.layers), (STATE, checkpoint.state)):
        content = save({n: np.asarray(t, order="C") for n, t in tensors.items()})
        digests[name] = content_digest(content)
        (folder / name).write_bytes(content)
    index = {
        "round": checkpoint.round,
        "base": checkpoint.base,
        "data": checkpoint.data,
        "run_token": checkpoint.run_token,
        "digests": digests,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def latest_checkpoint(run_folder: Path) -> Checkpoint | None:
    """Return the newest whole checkpoint, or None; log a warning for each damaged one."""
    for folder in _found(run_folder):
        try:
            return _read(folder)
        except (OSError, ValueError, KeyError) as error:
            log(WARNING, "checkpoint %s cannot be used: %s", folder, error)
    return None


def _found(run_folder: Path) -> list[Path]:
    """Return the checkpoints' folders, newest first."""
    return sorted((run_folder / FOLDER).glob("round-*"), reverse=True)


def _read(folder: Path) -> Checkpoint:
    index = read_json(folder / INDEX)
    tensors = {}
    for name in (LAYERS, STATE):
        content = (folder / name).read_bytes()
        if content_digest(content) != index["digests"][name]:
            raise ValueError(f"{name} is damaged")
        tensors[name] = load(content)
    return Checkpoint(
        round=index["round"],
        base=index["base"],
        run_token=index["run_token"],
        layers=tensors[LAYERS],
        state=tensors[STATE],
        data=index.get("data", ""),
    )
