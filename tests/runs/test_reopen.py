"""A run is gone on with if its files say the same as its checkpoint, and else refused in a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from layerfed.cli import app
from layerfed.config import ConfigError
from layerfed.engine import run_on
from layerfed.runs import checkpoint
from tests.tiny_task import configured

SMALL = ("task.name=tests.tiny_task:TinyTask", "train.local-steps=1")


def run(place: Path, rounds: int, *more: str) -> Path:
    settings = (*SMALL, f"run.dir={place}", "run.name=cut", f"federation.rounds={rounds}")
    return run_on("inprocess", configured(*settings, *more))


@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger.jsonl"])
def test_rounds_without_their_lines_are_not_gone_on_with(tmp_path: Path, name: str) -> None:
    folder = run(tmp_path, 2)
    rows = (folder / name).read_text().splitlines()
    kept = [row for row in rows if json.loads(row)["round"] < 2]
    (folder / name).write_text("".join(f"{row}\n" for row in kept))
    before = (folder / "summary.json").read_bytes()
    with pytest.raises(ConfigError, match=f"{name} lacks round 2, which its checkpoint has"):
        run(tmp_path, 3, f"run.resume={folder}")
    assert (folder / "summary.json").read_bytes() == before


def test_the_lines_of_a_round_are_on_the_disk_before_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(checkpoint, "flush", lambda file: done.append(file.name))
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *_: done.append("checkpoint"))
    run(tmp_path, 1)
    assert done.pop() == "checkpoint"
    assert {"metrics.jsonl", "ledger.jsonl", "clients.jsonl", "selection.jsonl"} <= {*done}


def test_rounds_that_are_done_cannot_be_taken_back(tmp_path: Path) -> None:
    folder = run(tmp_path, 2)
    before = (folder / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"federation.rounds = 1, and .* has done 2; give that"):
        run(tmp_path, 1, f"run.resume={folder}")
    assert (folder / "config.json").read_bytes() == before


@pytest.mark.parametrize("content", [None, "{"])
def test_a_missing_or_damaged_summary_is_one_line(tmp_path: Path, content: str | None) -> None:
    folder = run(tmp_path, 1)
    (folder / "summary.json").unlink()
    if content is not None:
        (folder / "summary.json").write_text(content)
    with pytest.raises(ConfigError, match=r"summary.json.*; it cannot be gone on with"):
        run(tmp_path, 2, f"run.resume={folder}")


@pytest.mark.parametrize("words", [("--dir", "elsewhere"), ("run.name=other",), ("run.resume=",)])
def test_a_resumed_run_stays_in_its_folder(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(configured().to_flat()))
    done = CliRunner().invoke(app, ["run", "--resume", str(tmp_path), *words])
    assert done.exit_code == 2
    assert f"leave out {' '.join(words)}" in " ".join(done.stderr.split())
