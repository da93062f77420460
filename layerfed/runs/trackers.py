"""Trackers: observers that write a run into TensorBoard, MLflow, Weights & Biases, or trackio.

`run.trackers` names them. Each gets the numbers of every round, the configuration, and at the end the
pictures and the other files of the run folder. A resumed run goes on in the same run of the tracker,
whose name there is kept in `trackers.json`.
"""

from __future__ import annotations

import math
import re
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from inspect import signature
from logging import WARNING
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

from flwr.common.logger import log

from layerfed.config import ConfigError, RunConfig, nearest
from layerfed.config.errors import naming_extras
from layerfed.config.section import imported, words
from layerfed.runs.files import read_json, write_json
from layerfed.runs.folder import metrics_line
from layerfed.runs.records import Observer, RoundRecord

__all__ = ["TRACKERS", "Tracker", "load_trackers", "round_numbers"]

INDEX = "trackers.json"
NOT_UPLOADED = {".lock", INDEX}


class Tracker(Observer):
    """The base of all trackers.

    Parameters
    ----------
    folder : Path
        The run folder.
    config : RunConfig
    """

    name: ClassVar[str]
    module: ClassVar[str]
    """The import name of its library."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config = folder, config
        self._works = True

    # ------------------------------------------------------------------ what a tracker implements
    @abstractmethod
    def open(self, identity: str, known: bool, done: int) -> str:
        """Begin, or go on with, a run of the tracker; return its name there.

        Parameters
        ----------
        identity : str
            That name, if it is known; else one that no other run has.
        known : bool
        done : int
            Finished rounds.
        """

    @abstractmethod
    def log(self, numbers: Mapping[str, float], number: int) -> None:
        """Write the numbers of a round."""

    @abstractmethod
    def close(self, status: str, files: Sequence[Path], pictures: Sequence[Path]) -> None:
        """Write the files of the run folder and end the run as completed, interrupted, or failed."""

    # ------------------------------------------------------------------------------ as an observer
    def on_start(self, rounds: int, before: RoundRecord, done: int = 0) -> None:
        """Begin, or go on.

        Raises
        ------
        ConfigError
            If the tracker refuses. The run then ends before its first round.
        """
        file = self.folder / INDEX
        kept: dict[str, Any] = read_json(file) if file.exists() else {}
        fresh = f"{self.folder.name}-{uuid4().hex[:8]}"
        try:
            with redirect_stdout(sys.stderr):
                found = self.open(kept.get(self.name, fresh), self.name in kept, done)
        except Exception as error:  # a library's own errors, of which each has its kinds
            raise ConfigError(
                f"run.trackers = '{self.config.run.trackers}': {self.name} cannot begin: {error}"
            ) from error
        write_json(file, kept | {self.name: found})
        known = {k: v for k, v in before.scores.items() if v is not None}
        if known and not done:
            with self._kept_going():
                # Under the names that later rounds have, `accuracy` and `scores/NAME`.
                self.log(dict(_flat({"accuracy": before.accuracy, "scores": known})), 0)

    def on_round(self, record: RoundRecord) -> None:
        """Write the numbers of a round."""
        with self._kept_going():
            self.log(round_numbers(record), record.round)

    def on_close(self, status: str) -> None:
        """Write the files and end."""
        files = sorted(f for f in self.folder.iterdir() if f.is_file())
        with self._kept_going():
            self.close(
                status,
                [f for f in files if f.name not in NOT_UPLOADED],
                [f for f in files if f.suffix == ".png"],
            )

    @contextmanager
    def _kept_going(self) -> Iterator[None]:
        """Log the first error of a tracker; a run of days does not fail because a server is away."""
        try:
            with redirect_stdout(sys.stderr):  # what a program reads is alone on standard output
                yield
        except Exception as error:
            if self._works:
                log(WARNING, "%s: %s; the run goes on without", self.name, error)
            self._works = False


def round_numbers(record: RoundRecord) -> dict[str, float]:
    """Return the numbers of a round by name, and the share of its clients that moved each layer."""
    numbers = dict(_flat(metrics_line(record)))
    if (selection := record.selection) is not None:
        for layer in selection.layers:
            moved = sum(layer in record.updated.get(client, ()) for client in selection.clients)
            numbers[f"selection/{layer}"] = moved / len(selection.clients)
    return {name: value for name, value in numbers.items() if name != "round"}


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in table.items():
        # The characters that every tracker takes in a name.
        name = prefix + re.sub(r"[^\w. -]", "_", key)
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield name, value


class TensorBoard(Tracker):
    """Events in the folder `tensorboard` of the run folder: `tensorboard --logdir runs`."""

    name, module = "tensorboard", "torch.utils.tensorboard"

    def open(self, identity: str, known: bool, done: int) -> str:
        """Begin a file of events, which takes the place of those of rounds after `done`."""
        from torch.utils.tensorboard import SummaryWriter

        place = str(self.folder / "tensorboard")
        self._writer = SummaryWriter(place, purge_step=done + 1 if known else None)
        if not known:
            settings = (f"    {key} = {value!r}" for key, value in self.config.to_flat().items())
            self._writer.add_text("configuration", "\n".join(settings))
        return "tensorboard"

    def log(self, numbers: Mapping[str, float], number: int) -> None:
        """Write scalars."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, number)
        self._writer.flush()

    def close(self, status: str, files: Sequence[Path], pictures: Sequence[Path]) -> None:
        """Write the pictures; the other files are beside it."""
        from matplotlib.image import imread

        for picture in pictures:
            self._writer.add_image(picture.stem, imread(picture)[..., :3], dataformats="HWC")
        self._writer.close()


class MLflow(Tracker):
    """A run in the experiment `run.project`, where MLFLOW_TRACKING_URI says."""

    name, module = "mlflow", "mlflow"
    ends: ClassVar[Mapping[str, str]] = {"completed": "FINISHED", "failed": "FAILED"}

    def open(self, identity: str, known: bool, done: int) -> str:
        """Make a run with the configuration as its parameters, or set a known one to running."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client, self._run = MlflowClient(), identity
        if known:
            self._client.update_run(identity, status="RUNNING")
            return identity
        project = self.config.run.project
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        self._run = self._client.create_run(experiment, run_name=self.folder.name).info.run_id
        settings = self.config.to_flat().items()
        params = [Param(key, str(value)) for key, value in settings]
        for start in range(0, len(params), 100):  # the most that one call may hold
            self._client.log_batch(self._run, params=params[start : start + 100])
        return self._run

    def log(self, numbers: Mapping[str, float], number: int) -> None:
        """Write metrics."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, number) for name, value in numbers.items()]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._run, metrics=metrics[start : start + 1000])

    def close(self, status: str, files: Sequence[Path], pictures: Sequence[Path]) -> None:
        """Write the files as artefacts and end the run."""
        for file in files:
            self._client.log_artifact(self._run, str(file))
        self._client.set_terminated(self._run, self.ends.get(status, "KILLED"))


class WeightsAndBiases(Tracker):
    """A run in the project `run.project`; WANDB_MODE=offline keeps it in the run folder."""

    name, module = "wandb", "wandb"

    def open(self, identity: str, known: bool, done: int) -> str:
        """Begin, or resume, a run under the name of the run folder."""
        import wandb

        self._run = wandb.init(
            project=self.config.run.project,
            id=identity,
            name=self.folder.name,
            dir=str(self.folder),
            config=self.config.to_flat(),
            resume="allow",
            settings=wandb.Settings(console="off"),
        )
        # A round that is done again would be left out if it were the step.
        self._run.define_metric("*", step_metric="round")
        return identity

    def log(self, numbers: Mapping[str, float], number: int) -> None:
        """Write the numbers of a round."""
        self._run.log({**numbers, "round": number})

    def close(self, status: str, files: Sequence[Path], pictures: Sequence[Path]) -> None:
        """Write the pictures and, as one artefact, the files; end the run."""
        import wandb

        self._run.log({picture.stem: wandb.Image(str(picture)) for picture in pictures})
        folder = wandb.Artifact(f"run-{self._run.id}", type="run")
        for file in files:
            folder.add_file(str(file))
        self._run.log_artifact(folder)
        self._run.finish(exit_code=int(status != "completed"))


class Trackio(Tracker):
    """A run in the project `run.project` of this machine; TRACKIO_DIR says where."""

    name, module = "trackio", "trackio"

    def open(self, identity: str, known: bool, done: int) -> str:
        """Begin, or resume, a run."""
        import trackio

        self._run = trackio.init(
            self.config.run.project,
            name=identity,
            config=self.config.to_flat(),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        return identity

    def log(self, numbers: Mapping[str, float], number: int) -> None:
        """Write the numbers of a round."""
        self._run.log(dict(numbers), step=number)

    def close(self, status: str, files: Sequence[Path], pictures: Sequence[Path]) -> None:
        """Write the pictures and, as one artefact, the files; end the run."""
        import trackio

        self._run.log({picture.stem: trackio.Image(str(picture)) for picture in pictures})
        folder = trackio.Artifact(f"run-{self._run.name}", type="run")
        for file in files:
            folder.add_file(str(file))
        self._run.log_artifact(folder)
        # Not the run's own method, after which it would be ended again at exit.
        trackio.finish()  # type: ignore[no-untyped-call]


TRACKERS: Mapping[str, type[Tracker]] = {
    tracker.name: tracker for tracker in (TensorBoard, MLflow, WeightsAndBiases, Trackio)
}


def load_trackers(config: RunConfig) -> list[Callable[[Path, RunConfig], Observer]]:
    """Return the observers that `run.trackers` names, still to be built from folder and configuration.

    Raises
    ------
    ConfigError
        If one is unknown, is no observer, or needs a library that is not installed.
    """
    from importlib import import_module

    found: list[Callable[[Path, RunConfig], Observer]] = []
    for name in words(config.run.trackers):
        if ":" in name:
            own = imported(name, "run.trackers")
            if not (isinstance(own, type) and issubclass(own, Observer)):
                raise ConfigError(
                    f"run.trackers = '{name}' is no observer; it should be a class of your own based on "
                    "layerfed.runs.records.Observer, built from a run folder and a configuration"
                )
            try:
                signature(own).bind(Path(), config)
            except TypeError as error:
                raise ConfigError(
                    f"run.trackers = '{name}' cannot be built from a run folder and a configuration "
                    f"({error}); its __init__ should take these two"
                ) from None
            found.append(own)
            continue
        if name not in TRACKERS:
            raise ConfigError(
                f"run.trackers = '{name}' is not allowed: it should be {', '.join(TRACKERS)}, or one of "
                f"your own as module:Class{nearest(name, TRACKERS)}"
            )
        with naming_extras(f"run.trackers = '{name}'"):
            import_module(TRACKERS[name].module)
        found.append(TRACKERS[name])
    return found
