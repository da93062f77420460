"""The view in the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from layerfed.cli import app
from tests.report.made_folder import make_folder

cli = CliRunner()


def test_a_folder_of_runs_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    make_folder(tmp_path / "one")
    make_folder(tmp_path / "two")
    result = cli.invoke(app, ["watch", str(tmp_path), "--terminal"])
    assert result.exit_code == 0, result.stderr
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert "completed" in lines["one"]
    assert "5/5" in lines["two"]
    assert "90.00%" in lines["two"]
    assert "▁" in lines["two"]
    assert "█" in lines["two"]


def test_a_run_shows_its_last_rounds_and_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    folder = make_folder(tmp_path / "one", rounds=15, layers=4)
    result = cli.invoke(app, ["watch", str(folder), "--terminal"])
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    rounds = [row for row in rows if row and row[0].isdecimal()]
    assert [row[0] for row in rounds] == [str(n) for n in range(4, 16)]
    metrics = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rounds[-1][1] == f"{metrics[-1]['accuracy']:.2%}"
    # Every client trains block 0.
    assert rounds[-1][-1][0] == "█"
    assert len(rounds[-1][-1]) == 4


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    result = cli.invoke(app, ["watch", str(tmp_path / "absent")])
    assert result.exit_code == 2
    assert "absent is no folder" in " ".join(result.stderr.split())
