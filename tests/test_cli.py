"""The command line: exit status, one clear line for what a user can mend, and the files it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from layerfed.cli import app

cli = CliRunner()
QUICK = ["federation.rounds=2", "federation.clients-per-round=3", "strategy.probe-batches=1"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["strategy.name=ilpp"], "strategy.name = 'ilpp' is not allowed"),
        (["federation.clients-per-round=11"], "federation.clients-per-round = 11 is above"),
        (["budget.layers=13"], "budget.layers = 13 is above the whole model: its 12"),
        (["budget.layers=0"], "below the cheapest layer"),
        (["budget.kind=half-normal", "budget.max=40"], "budget.max = 40 is above"),
        (["strategy.name=both"], "strategy.name = 'both' is undefined for budget.layers = 1"),
        (["model.blocks=nothing.*"], "nothing.*"),
        (["task.alpha=0.0001"], "task.alpha = 0.0001"),
        (["missing.toml"], "missing.toml"),
        (["--engine", "spark"], "--engine spark"),
    ],
)
def test_impossible_runs_end_with_one_line_before_anything_is_written(
    arguments: list[str], says: str, tmp_path: Path
) -> None:
    result = cli.invoke(app, ["run", *arguments, "--dir", str(tmp_path / "runs")])
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error:")]) == 1
    assert not (tmp_path / "runs").exists()


def test_run_leaves_a_whole_folder_and_prints_where(tmp_path: Path) -> None:
    arguments = ["run", *QUICK, "run.name=x", "--dir", str(tmp_path), "--engine", "inprocess"]
    result = cli.invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    folder = tmp_path / "x"
    assert {file.name for file in folder.iterdir()} == {
        "accuracy.png",
        "checkpoint",
        "config.json",
        "layers.json",
        "layers.png",
        "ledger.jsonl",
        "metrics.jsonl",
        "model.safetensors",
        "selection.jsonl",
        "summary.json",
        "theory.png",
    }
    assert str(folder) in result.stdout
    assert "round 2/2" in result.stderr

    again = cli.invoke(app, arguments)
    assert again.exit_code == 2
    assert "exists already" in again.stderr

    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["round"] for row in metrics] == [1, 2]
    for key in ("bytes_up", "bytes_down", "bytes_full_up", "bytes_full_down", "flops"):
        assert summary[key] == sum(row[key] for row in metrics)
    assert summary["accuracy"] == metrics[-1]["accuracy"]
    # The configuration in the folder runs again, to the same result.
    rerun = ["run", str(folder / "config.json"), "run.name=y", "--dir", str(tmp_path)]
    assert cli.invoke(app, rerun).exit_code == 0
    other = json.loads((tmp_path / "y/summary.json").read_text())
    assert other["accuracy"] == summary["accuracy"]


def test_report_draws_the_pictures_anew(tmp_path: Path) -> None:
    run = ["run", *QUICK, "run.name=x", "--dir", str(tmp_path), "strategy.name=top"]
    assert cli.invoke(app, run).exit_code == 0
    (tmp_path / "x/layers.png").unlink()
    assert cli.invoke(app, ["report", str(tmp_path / "x")]).exit_code == 0
    assert (tmp_path / "x/layers.png").read_bytes().startswith(b"\x89PNG")


def test_layers_prints_the_table() -> None:
    result = cli.invoke(app, ["layers"])
    assert result.exit_code == 0
    assert "12 selectable layers" in result.stdout
    assert "always trained" in result.stdout


def test_solve_prints_the_masks(tmp_path: Path) -> None:
    instance = tmp_path / "instance.json"
    instance.write_text(
        json.dumps(
            {
                "values": [[3.0, 1.0, 2.0], [1.0, 5.0, 2.0]],
                "costs": [1, 1, 1],
                "budgets": [1, 2],
                "consistency": 0.0,
            }
        )
    )
    result = cli.invoke(app, ["solve", str(instance)])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert set(found) == {"masks", "objective", "bound", "gap", "solver", "seconds", "rounding"}
    assert found["masks"] == [[1, 0, 0], [0, 1, 1]]
    assert found["objective"] == pytest.approx(10.0)

    instance.write_text('{"values": [[1]], "costs": [1], "budgets": [-1], "consistency": 0}')
    refused = cli.invoke(app, ["solve", str(instance)])
    assert refused.exit_code == 2
    assert "budgets" in refused.stderr


def test_compare_runs_a_grid_once_and_writes_its_table(tmp_path: Path) -> None:
    arguments = ["compare", *QUICK, "--strategies", "full,top,both", "--budgets", "1,2"]
    arguments += ["--seeds", "0", "--dir", str(tmp_path), "--engine", "inprocess"]
    first = cli.invoke(app, arguments)
    assert first.exit_code == 0, first.stderr
    names = {folder.name for folder in tmp_path.iterdir() if folder.is_dir()}
    assert names == {"full-R--seed0", "top-R1-seed0", "top-R2-seed0", "both-R2-seed0"}
    table = (tmp_path / "table.md").read_text()
    assert table in first.stdout
    assert "| both | – |" in table
    assert "**" in table

    stamp = (tmp_path / "top-R1-seed0/summary.json").stat().st_mtime_ns
    (tmp_path / "top-R2-seed0/summary.json").write_text('{"status": "running"}')
    second = cli.invoke(app, arguments)
    assert second.exit_code == 0, second.stderr
    assert (tmp_path / "top-R1-seed0/summary.json").stat().st_mtime_ns == stamp
    assert (tmp_path / "top-R2-seed0.interrupted-1").is_dir()
    assert (tmp_path / "table.md").read_text() == table

    other = cli.invoke(app, [*arguments, "train.lr=0.01"])
    assert other.exit_code == 2
    assert "train.lr" in other.stderr
