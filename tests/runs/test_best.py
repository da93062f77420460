"""The best model and the end of a run by its accuracy, also in a run that is resumed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from layerfed.config.same import differing
from layerfed.engine import run_on
from layerfed.runs import Checkpoint, latest_checkpoint, read_lines, restore_best
from layerfed.runs.checkpoint import save_checkpoint
from tests.tiny_task import configured

TASK = ("task.name=tests.tiny_task:TinyTask",)
SMALL = ("train.lr=0.5", "train.local-steps=1")


def run(place: Path, name: str, rounds: int, *more: str) -> Path:
    settings = (*TASK, f"run.dir={place}", f"run.name={name}", f"federation.rounds={rounds}")
    return run_on("inprocess", configured(*settings, *more))


def accuracies(folder: Path) -> list[float]:
    return [row["accuracy"] for row in read_lines(folder / "metrics.jsonl")]


def best(folder: Path) -> tuple[int, dict[str, np.ndarray]]:
    with safe_open(folder / "best.safetensors", "np") as file:
        number = int(file.metadata()["round"])
    return number, load_file(folder / "best.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seven rounds, of which the third is the best."""
    return run(tmp_path_factory.mktemp("whole"), "whole", 7, *SMALL)


def test_the_best_model_is_that_of_the_best_round(whole: Path, tmp_path: Path) -> None:
    found = accuracies(whole)
    number = int(np.argmax(found)) + 1
    assert 1 < number < 7, "the test needs a best round in between"
    # A run that ends there has this model in the end.
    there = run(tmp_path, "there", number, *SMALL)
    kept, tensors = best(whole)
    assert kept == number
    final = latest_checkpoint(there)
    assert final is not None
    assert tensors.keys() == final.layers.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, final.layers[name])


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 6])
def test_a_resumed_run_has_the_same_best_model(whole: Path, tmp_path: Path, cut: int) -> None:
    folder = run(tmp_path, "cut", cut, *SMALL)
    run(tmp_path, "cut", 7, *SMALL, f"run.resume={folder}")
    (number, tensors), (expected, others) = best(folder), best(whole)
    assert number == expected
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, others[name])
    assert not list(folder.glob("*.tmp"))


def test_the_best_model_of_rounds_after_the_checkpoint_is_dropped(tmp_path: Path) -> None:
    file, tensors = tmp_path / "best.safetensors", {"x": np.zeros(1, np.float32)}
    save_checkpoint(tmp_path, Checkpoint(1, "base", "run", tensors), 5)
    file.write_text("of round 2")
    save_checkpoint(tmp_path, Checkpoint(2, "base", "run", tensors), 5)
    file.unlink()
    file.write_text("of round 3")
    restore_best(tmp_path, 2)
    assert file.read_text() == "of round 2"
    restore_best(tmp_path, 2)  # killed and resumed again
    assert file.read_text() == "of round 2"
    restore_best(tmp_path, 1)
    assert not file.exists()


@pytest.mark.parametrize("every", [1, 2])
def test_a_run_ends_once_it_was_not_better_for_so_many_rounds(
    whole: Path, tmp_path: Path, every: int
) -> None:
    found = accuracies(whole)
    patience = 2
    stop = next(
        number
        for number in range(every, 8, every)
        if number - (max(range(every, number + 1, every), key=lambda r: found[r - 1])) >= patience
    )
    more = (*SMALL, f"federation.patience={patience}", f"run.evaluate-every={every}")
    folder = run(tmp_path, "stopped", 7, *more)
    rows = read_lines(folder / "metrics.jsonl")
    assert [row["round"] for row in rows] == list(range(1, stop + 1))
    assert stop < 7, "the test needs a run that ends early"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("completed", stop)
    # It can be gone on with, and ends as the run without patience.
    run(
        tmp_path,
        "stopped",
        7,
        *SMALL,
        f"run.evaluate-every={every}",
        f"run.resume={folder}",
    )
    for name, tensor in load_file(folder / "final.safetensors").items():
        np.testing.assert_array_equal(tensor, load_file(whole / "final.safetensors")[name])


def test_when_a_run_ends_may_change_as_long_as_its_rates_do_not() -> None:
    mine = configured("federation.patience=3", "federation.rounds=40")
    theirs = configured("federation.rounds=30").to_flat()
    assert differing(mine, theirs, {}, goes_on=True) == []
    assert differing(mine, theirs, {}) == ["federation.rounds", "federation.patience"]
    cosine = configured("federation.rounds=40", "server.lr-schedule=cosine")
    before = {**cosine.to_flat(), "federation.rounds": 30}
    assert differing(cosine, before, {}, goes_on=True) == ["federation.rounds"]
