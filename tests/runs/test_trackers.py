"""Runs in trackers, read back by each tracker's own library; a resumed run goes on in the same one."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from layerfed.config import ConfigError, RunConfig
from layerfed.engine import run_on
from layerfed.runs import read_lines
from layerfed.runs.records import Observer, RoundRecord
from layerfed.runs.trackers import TensorBoard, load_trackers
from tests.tiny_task import configured

TASK = "task.name=tests.tiny_task:TinyTask"
ROUNDS = 3


class Bare(Observer):
    """It takes nothing."""


class Own(Observer):
    """An observer as a user writes one."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.file, self.seed = folder / "own.txt", config.run.seed

    def on_round(self, record: RoundRecord) -> None:
        with self.file.open("a") as stream:
            stream.write(f"{self.seed} {record.round}\n")

    def on_close(self, status: str) -> None:
        with self.file.open("a") as stream:
            stream.write(status)


def tracked(trackers: str, place: Path, *more: str) -> Path:
    """Run two rounds, then go on to the third."""
    settings = (TASK, f"run.trackers={trackers}", "run.project=things", f"run.dir={place}", *more)
    config = configured(*settings, "run.name=x", "federation.rounds=2")
    folder = run_on("inprocess", config)
    run_on(
        "inprocess",
        configured(*settings, "run.name=x", "federation.rounds=3", f"run.resume={folder}"),
    )
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    found = read_lines(folder / "metrics.jsonl")
    assert len(found) == ROUNDS
    return found


def shares(folder: Path) -> list[float]:
    """The share of each round's clients that trained block 0."""
    rows = read_lines(folder / "selection.jsonl")
    return [sum(mask[0] for mask in row["masks"]) / len(row["masks"]) for row in rows]


@pytest.mark.usefixtures("pictures")
def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tracked("tensorboard", tmp_path)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    accuracy = [(event.step, event.value) for event in events.Scalars("accuracy")]
    assert [step for step, _ in accuracy] == [0, 1, 2, 3]
    assert [value for _, value in accuracy[1:]] == pytest.approx(
        [row["accuracy"] for row in lines(folder)]
    )
    found = [event.value for event in events.Scalars("selection/blocks.0")]
    assert found == pytest.approx(shares(folder))
    assert set(events.Tags()["images"]) >= {"accuracy", "layers"}
    [text] = events.Tensors("configuration/text_summary")
    assert b"train.lr = 0.1" in text.tensor_proto.string_val[0]


def test_tensorboard_drops_rounds_that_are_done_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, values in ((0, (1.0, 2.0, 3.0)), (1, (20.0, 30.0, 40.0))):
        tracker = TensorBoard(tmp_path, configured())
        tracker.on_start(9, RoundRecord(0), done)
        for number, value in enumerate(values, start=done + 1):
            tracker.log({"x": value}, number)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("x")]
    assert found == [(1, 1.0), (2, 20.0), (3, 30.0), (4, 40.0)]


@pytest.mark.usefixtures("pictures")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    folder = tracked("mlflow", tmp_path / "runs")
    client = MlflowClient()
    experiment = client.get_experiment_by_name("things")
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("x", "FINISHED")
    assert run.data.params["train.lr"] == "0.1"
    assert run.data.params["run.trackers"] == "mlflow"
    for key, of_rounds in (
        ("bytes_up", [row["bytes_up"] for row in lines(folder)]),
        ("selection/blocks.0", shares(folder)),
        ("seconds_by_phase/train", [row["seconds_by_phase"]["train"] for row in lines(folder)]),
    ):
        history = client.get_metric_history(run.info.run_id, key)
        assert [(m.step, m.value) for m in history] == list(enumerate(of_rounds, start=1))
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files >= {"config.json", "summary.json", "metrics.jsonl", "layers.png"}
    assert ".lock" not in files


def records(file: Path) -> Iterator[Any]:
    """Read an offline run of W&B: a log of LevelDB, in blocks of 32 KiB, of its own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
        if place + 7 > len(content):
            return
        _, size, kind = struct.unpack_from("<IHB", content, place)
        if place + 7 + size > len(content):
            return
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def whole_records(files: Sequence[Path]) -> list[Any]:
    """Read runs to their ends: W&B's own process may write the last block after `finish` returned."""
    deadline = time.monotonic() + 60
    while True:
        found = [record for file in files for record in records(file)]
        ends = sum(record.HasField("exit") for record in found)
        if ends == len(files) or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


@pytest.mark.usefixtures("pictures")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tracked("wandb", tmp_path)
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    found = whole_records(files)
    runs = [record.run for record in found if record.HasField("run")]
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {
        (json.loads((folder / "trackers.json").read_text())["wandb"], "things", "x")
    }
    assert ("train.lr", "0.1") in {(i.key, i.value_json) for i in runs[0].config.update}
    history = [
        {
            item.key or "::".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for record in found
        if record.HasField("history")
    ]
    rounds = {row["round"]: row["bytes_up"] for row in history if "bytes_up" in row}
    assert rounds == {row["round"]: row["bytes_up"] for row in lines(folder)}
    moved = [row["selection/blocks.0"] for row in history if "selection/blocks.0" in row]
    assert moved == pytest.approx(shares(folder))
    kinds = [row["layers::_type"] for row in history if "layers::_type" in row]
    assert kinds == ["image-file"] * 2
    artefacts = [r.artifact for r in found if r.HasField("artifact")] + [
        r.request.log_artifact.artifact for r in found if r.request.HasField("log_artifact")
    ]
    names = {entry.path for artefact in artefacts for entry in artefact.manifest.contents}
    assert names >= {"config.json", "summary.json", "layers.png"}
    assert [r.exit.exit_code for r in found if r.HasField("exit")] == [0, 0]


@pytest.mark.usefixtures("pictures")
def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trackio.sqlite_storage
    import trackio.utils

    for module in (trackio, trackio.utils, trackio.sqlite_storage):
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    folder = tracked("trackio", tmp_path / "runs")
    [run] = trackio.Api().runs("things")
    assert run.name == json.loads((folder / "trackers.json").read_text())["trackio"]
    assert run.config["train.lr"] == 0.1
    logged = trackio.sqlite_storage.SQLiteStorage.get_logs("things", run.name)
    rounds = {row["step"]: row["bytes_up"] for row in logged if "bytes_up" in row}
    assert rounds == {row["round"]: row["bytes_up"] for row in lines(folder)}
    assert any("layers" in row for row in logged)


def test_an_observer_of_ones_own(tmp_path: Path) -> None:
    folder = tracked("tests.runs.test_trackers:Own", tmp_path)
    assert (folder / "own.txt").read_text() == "0 1\n0 2\ncompleted0 3\ncompleted"


def test_a_tracker_that_fails_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(self: TensorBoard, numbers: object, number: int) -> None:
        raise OSError("the server is away")

    monkeypatch.setattr(TensorBoard, "log", away)
    monkeypatch.setattr("flwr.common.logger.FLOWER_LOGGER.propagate", True)
    folder = tracked("tensorboard", tmp_path)
    assert json.loads((folder / "summary.json").read_text())["status"] == "completed"
    said = [r.getMessage() for r in caplog.records if "server is away" in r.getMessage()]
    assert said == ["tensorboard: the server is away; the run goes on without"] * 2


def test_one_that_cannot_begin_ends_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/no/such/folder/x.db")
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_MAX_RETRIES", "0")
    (tmp_path / "no").touch()
    with pytest.raises(ConfigError, match=r"^run\.trackers = 'mlflow': mlflow cannot begin: "):
        run_on("inprocess", configured(TASK, "run.trackers=mlflow", f"run.dir={tmp_path / 'runs'}"))


@pytest.mark.parametrize(
    ("trackers", "says"),
    [
        ("tensorbord", "did you mean tensorboard?"),
        ("tensorboard, neptune", "'neptune' is not allowed"),
        ("tests.tiny_task:TinyTask", "is no observer"),
        ("no_such_module:Own", "cannot be imported"),
        ("tests.runs.test_trackers:Bare", "cannot be built from a run folder and a configuration"),
    ],
)
def test_others_are_refused_before_anything_is_written(
    trackers: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        run_on(
            "inprocess", configured(TASK, f"run.trackers={trackers}", f"run.dir={tmp_path / 'r'}")
        )
    assert says in str(caught.value)
    assert not (tmp_path / "r").exists()
    assert load_trackers(configured()) == []
