"""Checkpoints, from which a run continues as if it had never stopped.

A checkpoint is a folder `checkpoint/round-000012` in the run folder. It is written beside its place,
flushed to the disk and renamed, so that the last checkpoint is whole however a run is killed. It holds

- `layers.safetensors`: tensors of the layers that differ from the pretrained base;
- `state.safetensors`: arrays of the server's optimiser and of the strategy, by name;
- `state.json`: round, fingerprints of the base and of the data, the run's token, and a digest of each
  file;
- `best.safetensors`, the best model so far, if there is one: a link to the run folder's own file.

Random draws need no state, since each has its own seed from purpose, round and client.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from logging import WARNING
from pathlib import Path

import numpy as np
from flwr.common.logger import log
from safetensors.numpy import load, save

from layerfed.digests import content_digest
from layerfed.exchange.scores import ACCURACY, Score
from layerfed.files import flush, whole
from layerfed.runs.files import read_json, read_lines, write_tensors
from layerfed.runs.records import Observer, RoundRecord

__all__ = [
    "BestModel",
    "Checkpoint",
    "Checkpoints",
    "latest_checkpoint",
    "restore_best",
    "save_checkpoint",
]

FOLDER = "checkpoint"
LAYERS, STATE, INDEX = "layers.safetensors", "state.safetensors", "state.json"
BEST = "best.safetensors"


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


class BestModel(Observer):
    """An observer that keeps the model of the best round by the main score, `best.safetensors`.

    Parameters
    ----------
    run_folder : Path
        The rounds in its `metrics.jsonl` are those of before an interruption.
    base : str
        Fingerprint of the base.
    layers : Callable[[], Mapping[str, numpy.ndarray]]
        Returns the tensors of the layers that differ from the base.
    metric : Score (default: accuracy)
        The main score.
    """

    def __init__(
        self,
        run_folder: Path,
        base: str,
        layers: Callable[[], Mapping[str, np.ndarray]],
        metric: Score = ACCURACY,
    ) -> None:
        self._folder, self._base, self._layers = run_folder, base, layers
        self._metric = metric
        self._best: tuple[int, float] | None = None
        self._behind = 0
        rows = run_folder / "metrics.jsonl"
        for row in read_lines(rows) if rows.exists() else []:
            # Lines of earlier versions have accuracy and loss only.
            self._is_best(row["round"], row.get("scores", row).get(metric.name))

    def _is_best(self, number: int, value: float | None) -> bool:
        """Note a round; return whether it is the best so far. Of equal rounds the first one is."""
        if value is None or math.isnan(value):
            return False
        better = self._best is None or self._metric.better(value, self._best[1])
        if self._best is None or better:
            self._best = number, value
        self._behind = number - self._best[0]
        return better

    def on_round(self, record: RoundRecord) -> None:
        """Write the model, if the round is the best so far."""
        if self._is_best(record.round, record.value):
            origin = {"round": str(record.round), "base": self._base}
            write_tensors(self._folder / BEST, self._layers(), origin)

    def stalled(self, patience: int) -> bool:
        """Return whether the last evaluated round is `patience` rounds behind the best; 0: never."""
        return 0 < patience <= self._behind


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
            # A run that goes on counts its rounds, and the privacy that they cost, by these lines.
            for lines in self._folder.glob("*.jsonl"):
                flush(lines)
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
    with whole(place, durable=True) as beside:
        beside.mkdir(parents=True)
        _fill(beside, checkpoint)
        if (best := run_folder / BEST).exists():
            _link(best, beside / BEST)
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


def _link(file: Path, place: Path) -> None:
    """Give a file that is never written in place another path, by a copy where links do not work."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)


def restore_best(run_folder: Path, last_round: int) -> None:
    """Put back the best model as it was at the checkpoint of a round, from which the run continues."""
    kept, place = run_folder / FOLDER / f"round-{last_round:06d}" / BEST, run_folder / BEST
    place.unlink(missing_ok=True)
    if kept.exists():
        _link(kept, place)


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
