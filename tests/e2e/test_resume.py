"""A killed run continues to the same end, whenever it was killed."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy import Result
from PIL import Image
from safetensors.numpy import load_file

from layerfed.client.workbench import Workbench
from layerfed.config import ConfigError, RunConfig, load_config
from layerfed.engine import run_on
from layerfed.runs import latest_checkpoint, lock, read_lines
from layerfed.runs.files import NotWritten, append_line, write_json
from layerfed.strategies import SelectiveStrategy
from layerfed.task import Batch
from layerfed.task.scoring import tallied

QUICK = [
    *("federation.clients=4", "federation.clients-per-round=2", "federation.rounds=8"),
    *("train.local-steps=1", "train.batch-size=8", "strategy.period=3", "run.device=cpu"),
    *("server.optimizer=adam", "server.lr=0.01"),
]


def configured(directory: Path, name: str, *more: str) -> RunConfig:
    return load_config(None, [*QUICK, f"run.dir={directory}", f"run.name={name}", *more])


def resumed(config: RunConfig, folder: Path) -> RunConfig:
    section = config.run.model_copy(update={"resume": str(folder)})
    return config.model_copy(update={"run": section})


def run_until_killed(config: RunConfig, seconds: float) -> bool:
    """Run in a process of its own and kill it after a while; return whether it ended before."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run_on("inprocess", config)
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0
            return True
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def without_times(folder: Path, name: str) -> list[dict[str, object]]:
    rows = read_lines(folder / name)
    for row in rows:
        for key in [key for key in row if "seconds" in key or "memory" in key]:
            row.pop(key)
    return rows


def same(first: Path, second: Path) -> None:
    one, two = (load_file(folder / "final.safetensors") for folder in (first, second))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
    assert without_times(first, "selection.jsonl") == without_times(second, "selection.jsonl")
    assert without_times(first, "metrics.jsonl") == without_times(second, "metrics.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, whose task and model processes forked later have in memory."""
    return run_on("inprocess", configured(tmp_path_factory.mktemp("whole"), "whole"))


@pytest.mark.slow
def test_killed_again_and_again_it_ends_like_the_run_that_was_not(
    whole: Path, tmp_path: Path
) -> None:
    config, folder = configured(tmp_path, "broken"), tmp_path / "broken"
    took = json.loads((whole / "summary.json").read_text())["seconds"]
    moments = random.Random(0)
    kills, begun = 0, False
    while True:
        checkpoints = folder / "checkpoint"
        begun = begun or (checkpoints.exists() and any(checkpoints.glob("round-*")))
        if not begun and folder.exists():
            for file in sorted(
                folder.rglob("*"), reverse=True
            ):  # killed before its first checkpoint
                file.rmdir() if file.is_dir() else file.unlink()
            folder.rmdir()
        now = resumed(config, folder) if begun else config
        # After 20 kills it may run to its end.
        if run_until_killed(now, moments.uniform(0.0, took / 3) if kills < 20 else 600):
            break
        kills += 1
    assert kills >= 3
    same(whole, folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("completed", 8)
    before = json.loads((whole / "summary.json").read_text())
    for key in ("accuracy", "initial_accuracy", "bytes_up", "bytes_down", "flops", "failures"):
        assert summary[key] == before[key], key


@pytest.mark.parametrize("full", ["metrics.jsonl", "selection.jsonl", "summary.json"])
def test_a_full_disk_fails_the_run_and_costs_the_round_in_flight(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    """From round 4 on a file cannot be written; there is room again for the resumed run."""
    folder = tmp_path / "broken"

    def no_room(file: Path, *content: object) -> None:
        rows = read_lines(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
        if file.name == full and len(rows) >= (3 if full == "metrics.jsonl" else 4):
            raise NotWritten(file, OSError(errno.ENOSPC, "No space left on device"))
        {"append_line": append_line, "write_json": write_json}[kind](file, *content)

    kind = "write_json" if full == "summary.json" else "append_line"
    with monkeypatch.context() as patch:
        patch.setattr(f"layerfed.runs.folder.{kind}", no_room)
        with pytest.raises(NotWritten, match=f"{full} cannot be written: No space left"):
            run_on("inprocess", configured(tmp_path, "broken"))
    found = latest_checkpoint(folder)
    assert found is not None
    assert found.round == 3
    if full != "summary.json":
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["status"], "No space left" in summary["error"]) == ("failed", True)
    run_on("inprocess", resumed(configured(tmp_path, "broken"), folder))
    same(whole, folder)


def test_a_run_that_goes_on_elsewhere_is_not_resumed(whole: Path, tmp_path: Path) -> None:
    """Another process, as a ServerApp that its SuperLink left behind, still writes the folder."""
    before = {file: file.read_bytes() for file in whole.glob("*.json*")}
    config = configured(tmp_path, "x", "federation.rounds=9")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        held = lock(whole)
        os.write(writing, b"!")
        time.sleep(600)
        os._exit(held.is_locked)
    try:
        os.read(reading, 1)
        with pytest.raises(ConfigError, match="is being written by a run"):
            run_on("inprocess", resumed(config, whole))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert before == {file: file.read_bytes() for file in whole.glob("*.json*")}
    lock(whole).release()  # the process that held it is dead


def test_a_finished_run_can_be_given_more_rounds(whole: Path, tmp_path: Path) -> None:
    short = run_on("inprocess", configured(tmp_path, "short", "federation.rounds=4"))
    more = configured(tmp_path, "short")
    assert run_on("inprocess", resumed(more, short)) == short
    same(whole, short)


def test_a_run_that_was_asked_to_stop_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked after round 3, between two checkpoints."""

    def stopped(self: SelectiveStrategy, *given: Any, **named: Any) -> Result:
        named["should_stop"] = lambda: self.round.record.round == 3
        return start(self, *given, **named)

    start, config = SelectiveStrategy.start, configured(tmp_path, "x", "run.checkpoint-every=2")
    with monkeypatch.context() as patch:
        patch.setattr(SelectiveStrategy, "start", stopped)
        folder = run_on("inprocess", config)
    assert [row["round"] for row in read_lines(folder / "metrics.jsonl")] == [1, 2, 3]
    assert "stopped" in (folder / "report.html").read_text()
    found = latest_checkpoint(folder)
    assert found is not None
    assert found.round == 3
    run_on("inprocess", resumed(config, folder))
    same(whole, folder)


def test_another_configuration_is_refused(whole: Path, tmp_path: Path) -> None:
    before = (whole / "metrics.jsonl").read_text()
    other = configured(tmp_path, "x", "train.lr=0.5")
    with pytest.raises(ConfigError, match=r"had another configuration \(train\.lr\)"):
        run_on("inprocess", resumed(other, whole))
    assert (whole / "metrics.jsonl").read_text() == before


def test_the_size_of_batches_changes_no_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def recorded(model: object, batches: Iterable[Batch], update: object) -> int:
        found = list(batches)
        seen.append(max(len(batch["label"]) for batch in found))
        return tallied(model, found, update)  # type: ignore[arg-type]

    monkeypatch.setattr("layerfed.task.scoring.tallied", recorded)
    monkeypatch.setattr(Workbench, "evaluation_rows", 5)
    accuracies = []
    for size in (7, 256, 0):
        more = ["federation.rounds=1", "task.local-test=0.5", f"run.evaluate-batch={size}"]
        folder = run_on("inprocess", configured(tmp_path, f"of-{size}", *more))
        accuracies.append(read_lines(folder / "metrics.jsonl")[0]["accuracy"])
        assert max(seen) <= (size or 5)
        seen.clear()
    assert len(set(accuracies)) == 1


def images(folder: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(24):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}/{i}.png")
    return folder


def test_a_run_goes_on_with_its_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another folder of that name, in the folder where it is resumed, was taken without a word."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number, name in enumerate(("one", "two")):
        images(tmp_path / name / "photos", number)
    monkeypatch.chdir(tmp_path / "one")
    settings = [
        *("task.name=custom", "task.data=photos", "task.image-size=32", "task.alpha=50"),
        *("federation.clients=2", "federation.clients-per-round=2", "federation.rounds=2"),
        *("strategy.period=1", "strategy.name=top", "run.dir=runs"),
    ]
    whole = run_on("inprocess", load_config(None, [*QUICK, *settings, "run.name=whole"]))
    short = [*QUICK, *settings, "run.name=short", "federation.rounds=1"]
    folder = run_on("inprocess", load_config(None, short))
    written = json.loads((folder / "config.json").read_text())
    assert written["task.data"] == str(tmp_path / "one/photos")
    assert written["run.dir"] == str(tmp_path / "one/runs")
    before = (folder / "metrics.jsonl").read_text()

    monkeypatch.chdir(tmp_path / "two")
    named = load_config(None, [*short, "federation.rounds=2"])
    with pytest.raises(
        ConfigError, match=r"made on other data \(\w+\) than task\.data = 'photos' now"
    ):
        run_on("inprocess", resumed(named, folder))
    assert (folder / "metrics.jsonl").read_text() == before
    # From any folder, with its own configuration, and if its data moved.
    moved = tmp_path / "elsewhere"
    (tmp_path / "one/photos").rename(moved)
    more = ["federation.rounds=2", f"task.data={moved}"]
    run_on("inprocess", resumed(load_config(folder / "config.json", more), folder))
    same(whole, folder)


@pytest.mark.parametrize("other", ["run.seed=1", "federation.clients-per-round=3"])
def test_what_would_change_the_past_is_refused(whole: Path, tmp_path: Path, other: str) -> None:
    before = {file: file.read_bytes() for file in whole.glob("*.json*")}
    with pytest.raises(ConfigError, match="another"):
        run_on("inprocess", resumed(configured(tmp_path, "x", other), whole))
    assert before == {file: file.read_bytes() for file in whole.glob("*.json*")}


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    folder = run_on(
        "inprocess", configured(tmp_path, "none", "federation.rounds=1", "run.checkpoint-every=0")
    )
    assert not (folder / "checkpoint").exists()
    config = configured(tmp_path, "none", "federation.rounds=1")
    with pytest.raises(ConfigError, match="holds no checkpoint that can be used"):
        run_on("inprocess", resumed(config, folder))


def test_its_configuration_runs_it_again_from_the_start(whole: Path) -> None:
    assert json.loads((whole / "config.json").read_text())["run.resume"] == ""
