"""Private runs from end to end: ε in their folders, also after interruptions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from layerfed.cli import app
from layerfed.config import RunConfig, load_config
from layerfed.engine import run_on
from layerfed.privacy.account import epsilon_of
from layerfed.runs import read_lines

QUICK = [
    *("federation.clients=4", "federation.clients-per-round=2", "federation.rounds=4"),
    *("train.local-steps=1", "train.batch-size=8", "run.device=cpu", "privacy.noise=2.0"),
]
STATISTICS = ["privacy.statistics-clip=1.0", "privacy.statistics-noise=3.0"]


def configured(directory: Path, name: str, *more: str) -> RunConfig:
    return load_config(None, [*QUICK, f"run.dir={directory}", f"run.name={name}", *more])


def resumed(config: RunConfig, folder: Path) -> RunConfig:
    section = config.run.model_copy(update={"resume": str(folder)})
    return config.model_copy(update={"run": section})


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def spent(folder: Path) -> list[float]:
    return [row["epsilon"] for row in read_lines(folder / "metrics.jsonl")]


@pytest.mark.parametrize("mode", ["central", "local"])
def test_a_run_reports_what_it_spent(mode: str, tmp_path: Path) -> None:
    config = configured(tmp_path, mode, f"privacy.mode={mode}", *STATISTICS)
    folder = run_on("inprocess", config)
    times: Counter[int] = Counter()
    for epsilon, row in zip(spent(folder), read_lines(folder / "ledger.jsonl"), strict=True):
        times.update(row["clients"])
        most = max(times.values())
        assert epsilon == pytest.approx(epsilon_of(most * (4 / 4 + 4 / 9), 1e-5))
    summary = summary_of(folder)
    assert summary["status"] == "completed"
    assert (summary["epsilon"], summary["delta"]) == (spent(folder)[-1], 1e-5)
    assert summary["epsilon_covers"] == "updates and selection"
    for row in read_lines(folder / "metrics.jsonl"):
        assert (row["train_loss"], row["e2"], row["failures"]) == (None, None, 0)


def test_two_private_runs_of_one_seed_differ(tmp_path: Path) -> None:
    """Noise that a seed can repeat could be subtracted."""
    first, second = (
        run_on("inprocess", configured(tmp_path, name, "privacy.mode=central"))
        for name in ("first", "second")
    )
    models = [(folder / "final.safetensors").read_bytes() for folder in (first, second)]
    assert models[0] != models[1]
    assert spent(first) == spent(second)


def test_a_run_that_goes_on_has_spent_what_one_that_did_not_stop_has(tmp_path: Path) -> None:
    short = configured(tmp_path, "short", "privacy.mode=local", "federation.rounds=2")
    folder = run_on("inprocess", short)
    longer = configured(tmp_path, "short", "privacy.mode=local")
    assert run_on("inprocess", resumed(longer, folder)) == folder
    whole = run_on("inprocess", configured(tmp_path, "whole", "privacy.mode=local"))
    assert spent(folder) == spent(whole)
    assert summary_of(folder)["repeated_rounds"] == []


def test_rounds_that_were_cut_off_have_been_spent_too(tmp_path: Path) -> None:
    """Killed in round 5, after a checkpoint of round 2: rounds 3 and 4 are lost, and 5 had begun."""
    settings = ["privacy.mode=central", "run.checkpoint-every=2"]
    folder = run_on("inprocess", configured(tmp_path, "cut", *settings))
    whole = spent(folder)
    (folder / "checkpoint/round-000004").rename(tmp_path / "lost")
    (folder / "summary.json").write_text(json.dumps(summary_of(folder) | {"status": "running"}))

    run_on("inprocess", resumed(configured(tmp_path, "cut", *settings), folder))
    assert summary_of(folder)["repeated_rounds"] == [3, 4, 5]
    assert spent(folder)[:2] == whole[:2]
    times: Counter[int] = Counter()
    for row in read_lines(folder / "ledger.jsonl"):
        times.update(row["clients"])
    expected = epsilon_of(max(times.values()) + 3, 1e-5)
    assert summary_of(folder)["epsilon"] == pytest.approx(expected)
    assert summary_of(folder)["epsilon"] > whole[-1]


def test_a_run_that_promises_nothing_says_nothing(tmp_path: Path) -> None:
    config = configured(tmp_path, "plain", "privacy.noise=0.0", "federation.rounds=1")
    folder = run_on("inprocess", config)
    summary = summary_of(folder)
    assert (summary["epsilon"], summary["epsilon_covers"], summary["delta"]) == (None, None, None)
    assert spent(folder) == [None]


def test_the_command_line_shows_it_and_warns_of_what_is_not_covered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = [*QUICK, "privacy.mode=central", "privacy.noise=0", "federation.rounds=1"]
    with caplog.at_level("WARNING", "flwr"):
        result = CliRunner().invoke(app, ["run", *settings, "run.name=x", "--dir", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    assert "ε inf" in result.stderr
    assert "ε = inf at δ = 1e-05, by client, for updates" in result.stdout
    assert summary_of(tmp_path / "x")["epsilon"] == "inf"
    assert "only clipped, and ε is infinite" in caplog.text
    assert "ε covers updates, not the choice of layers" in caplog.text
