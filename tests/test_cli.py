"""The command line: its exit status, one clear line for a user's mistake, and its files."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import layerfed
from layerfed.cli import app
from layerfed.config.command_line import complete_setting
from layerfed.runs import ProgressLine

cli = CliRunner()
QUICK = [
    *("federation.rounds=2", "federation.clients-per-round=3", "strategy.probe-batches=1"),
    *("train.local-steps=1", "train.batch-size=8"),
]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["strategy.name=ilpp"], "strategy.name = 'ilpp' is not allowed"),
        (["federation.clients-per-round=11"], "federation.clients-per-round = 11 is above"),
        (["budget.layers=13"], "budget.layers = 13 is above the whole model: its 12"),
        (["budget.layers=0"], "below the least that a client can train"),
        (["budget.kind=half-normal", "budget.max=40"], "budget.max = 40 is above"),
        (["strategy.name=both"], "strategy.name = 'both' is undefined for budget.layers = 1"),
        (["model.blocks=nothing.*"], "nothing.*"),
        (["task.alpha=0.0001"], "task.alpha = 0.0001"),
        (["missing.toml"], "missing.toml"),
        (["--engine", "spark"], "--engine spark"),
        (["--engine", "inproces"], "did you mean inprocess?"),
        (["trian.lr=1"], "did you mean train.lr?"),
        (["missing[x].toml"], "cannot read configuration missing[x].toml"),
        (["task.name=no_such_module:Task"], "task.name = 'no_such_module:Task' cannot be imported"),
        (
            ["task.name=cifar10", "model.name=timm/resnet5O", "model.weights=random"],
            "did you mean resnet50?",
        ),
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


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--dir", "~nobody-here/runs"],
        ["compare", "--dir", "~nobody-here/runs", "--strategies", "top"],
    ],
)
def test_the_folder_of_an_unknown_user_is_refused(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder `~nobody-here` was made in the current one, or a traceback was printed."""
    monkeypatch.chdir(tmp_path)
    result = cli.invoke(app, arguments)
    assert result.exit_code == 2
    assert "error: '~nobody-here/runs': there is no user 'nobody-here'" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("pictures")
def test_run_leaves_a_whole_folder_and_prints_where(tmp_path: Path) -> None:
    arguments = ["run", *QUICK, "run.name=x", "--dir", str(tmp_path), "--engine", "inprocess"]
    result = cli.invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    folder = tmp_path / "x"
    pictures = ("accuracy", "confusion", "data", "layers", "scores", "theory")
    assert {file.name for file in folder.iterdir()} == {
        *(f"{name}.png" for name in pictures),
        ".lock",
        "best.safetensors",
        "checkpoint",
        "classes.json",
        "clients.jsonl",
        "config.json",
        "data.json",
        "evaluation.json",
        "final.safetensors",
        "layers.json",
        "ledger.jsonl",
        "metrics.jsonl",
        "report.html",
        "selection.jsonl",
        "summary.json",
    }
    assert str(folder) in result.stdout
    assert "round 2/2" in result.stderr
    assert "client 9" in result.stderr, "who holds what is said before the run"
    assert "precision" in result.stdout

    again = cli.invoke(app, arguments)
    assert again.exit_code == 2
    assert f"exists already; go on with that run (--resume {folder})" in again.stderr

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


def test_data_says_who_holds_what_and_draws_it(tmp_path: Path) -> None:
    picture = tmp_path / "mine.png"
    found = cli.invoke(app, ["data", "federation.clients=4", "--picture", str(picture)])
    assert found.exit_code == 0, found.stderr
    lines = [line.split() for line in found.stdout.splitlines()]
    counts = {
        " ".join(words[:2]): list(map(int, words[2:])) for words in lines if words[0] == "client"
    }
    assert list(counts) == [f"client {i}" for i in range(4)]
    assert all(row[0] == sum(row[1:]) for row in counts.values())
    assert sum(row[0] for row in counts.values()) == 1437
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("pictures")
def test_report_draws_the_pictures_anew(tmp_path: Path) -> None:
    run = ["run", *QUICK, "run.name=x", "--dir", str(tmp_path), "strategy.name=top"]
    assert cli.invoke(app, run).exit_code == 0
    (tmp_path / "x/layers.png").unlink()
    assert cli.invoke(app, ["report", str(tmp_path / "x")]).exit_code == 0
    assert (tmp_path / "x/layers.png").read_bytes().startswith(b"\x89PNG")


def test_report_prints_the_tables_of_a_comparison(tmp_path: Path) -> None:
    (tmp_path / "table.md").write_text("| ilp | 95.7 |\n")
    (tmp_path / "table.csv").write_text("")
    (tmp_path / "table-accuracy.png").write_bytes(b"")
    (tmp_path / "notes.md").write_text("of the user's")
    result = cli.invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    assert "| ilp | 95.7 |" in result.stdout
    assert str(tmp_path / "table-accuracy.png") in result.stdout
    assert "of the user's" not in result.stdout


def test_report_on_another_folder_is_one_line(tmp_path: Path) -> None:
    result = cli.invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert [line for line in result.stderr.splitlines() if line] == [
        f"error: {tmp_path} is no run folder and no folder of a comparison: it has neither "
        "summary.json nor a table"
    ]


@pytest.mark.parametrize("done", [0, 1])
def test_ctrl_c_says_what_is_left_and_how_to_go_on(
    done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: ProgressLine, server_round: int, phase: str) -> None:
        if server_round == done + 1 and phase == "train":
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressLine, "on_phase", interrupt)
    folder = tmp_path / "a run[1]" / "x"
    run = ["run", *QUICK, "run.name=x", "--dir", str(folder.parent), "strategy.name=top"]
    result = cli.invoke(app, run)
    assert result.exit_code == 130
    last = result.stderr.splitlines()[-1]
    if done:
        assert last == f"interrupted; to go on: layerfed run --resume '{folder}'"
    else:
        assert last == f"interrupted before the first checkpoint; run folder {folder}"
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"


TASK = """
from layerfed.task.digits import Digits


class Mine(Digits):
    pass
"""


def test_a_task_in_the_current_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_task_of_mine.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    result = cli.invoke(app, ["layers", "task.name=a_task_of_mine:Mine"])
    assert result.exit_code == 0, result.stderr
    assert "a_task_of_mine:Mine: 12 selectable layers" in result.stdout


def test_help_shows_arguments_and_defaults() -> None:
    text = " ".join(cli.invoke(app, ["run", "--help"], env={"COLUMNS": "200"}).stdout.split())
    assert "A configuration file (conf/*.toml), then key=value settings" in text
    assert "[default: (./runs)]" in text
    text = " ".join(cli.invoke(app, ["solve", "--help"], env={"COLUMNS": "200"}).stdout.split())
    assert '{"values": [[…]], "costs": […], "budgets": […], "consistency": λ}' in text


def test_version() -> None:
    result = cli.invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"layerfed {layerfed.__version__}\n")


def test_keys_are_completed() -> None:
    assert complete_setting("train.lo") == ["train.local-steps=", "train.local-epochs="]


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


COMPARE = [*QUICK, "federation.clients=4"]


@pytest.mark.slow
def test_compare_goes_on_with_what_was_interrupted_and_runs_the_rest(tmp_path: Path) -> None:
    """Two processes at a time; one resumes a run whose second round was lost."""
    arguments = ["compare", *COMPARE, "--strategies", "top,bottom,both", "--budgets", "1"]
    arguments += ["--seeds", "0", "--dir", str(tmp_path), "--jobs", "2"]
    interrupted = tmp_path / "top-R1-seed0"
    run = ["run", *COMPARE, "strategy.name=top", "budget.layers=1.0", "--dir", str(tmp_path)]
    assert cli.invoke(app, [*run, f"run.name={interrupted.name}"]).exit_code == 0
    before = json.loads((interrupted / "summary.json").read_text())
    (interrupted / "summary.json").write_text(json.dumps(before | {"status": "interrupted"}))
    shutil.rmtree(interrupted / "checkpoint/round-000002")
    round_1 = (interrupted / "metrics.jsonl").read_text().splitlines()[0]

    first = cli.invoke(app, arguments)
    assert first.exit_code == 0, first.stderr
    assert "2 runs in" in first.stderr
    assert "1 to continue from a checkpoint, 1 to run" in first.stderr
    assert (interrupted / "metrics.jsonl").read_text().splitlines()[0] == round_1
    after = json.loads((interrupted / "summary.json").read_text())
    for key in ("status", "rounds", "accuracy", "bytes_up", "flops"):
        assert after[key] == before[key]
    table = (tmp_path / "table.md").read_text()
    assert table in first.stdout
    assert "| both | – | … | … | … |" in table
    assert "**" in table

    second = cli.invoke(app, arguments)
    assert second.exit_code == 0, second.stderr
    assert "2 done" in second.stderr
    assert json.loads((interrupted / "summary.json").read_text()) == after
    assert (tmp_path / "table.md").read_text() == table

    other = cli.invoke(app, [*arguments, "train.lr=0.01"])
    assert other.exit_code == 2
    assert "train.lr" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--strategies", "ilpp"], "row 'ilpp': strategy.name = 'ilpp' is not allowed"),
        (["--strategies", "ilpp"], "did you mean ilp?"),
        (["--strategies", "top,top"], "row 'top' occurs twice"),
        (["--budgets", "two"], "budget 'two' is neither a number nor half-normal"),
        (["--seeds", "0,x"], "seed 'x' is not a whole number"),
        (["--engine", "spark"], "--engine spark"),
        (["strategy.name=top"], "strategy.name is decided by rows (--strategies)"),
        (["--only", "cifar10"], "--only cifar10 is for table files"),
        (["missing.toml"], "cannot read configuration missing.toml"),
        (["TABLE", "--strategies", "top"], "--strategies top: TABLE has rows and budgets"),
        (["TABLE", "--only", "mnist"], "it has cifar10"),
        (["TABLE", "train.lr=fast"], "experiment 'cifar10': train.lr = 'fast'"),
        (["TABLE", "--seeds", "-1"], "seed '-1' is not a whole number"),
    ],
)
def test_impossible_comparisons_end_before_anything_runs(
    arguments: list[str], says: str, tmp_path: Path
) -> None:
    table = str(Path(__file__).parents[1] / "conf/tables/table3.toml")
    given = [table if word == "TABLE" else word for word in arguments]
    result = cli.invoke(app, ["compare", *given, "--dir", str(tmp_path / "runs")])
    assert result.exit_code == 2
    assert says.replace("TABLE", table) in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error:")]) == 1
    assert not (tmp_path / "runs").exists()


def test_data_that_are_missing_are_named_before_anything_runs(tmp_path: Path) -> None:
    table = str(Path(__file__).parents[1] / "conf/tables/table3.toml")
    gone = tmp_path / "gone"
    arguments = ["compare", table, f"task.data={gone}", "--dir", str(tmp_path / "runs")]
    model = ["model.name=layerfed/vit", "model.weights=embedded"]
    result = cli.invoke(app, [*arguments, *model])
    assert result.exit_code == 2
    assert f"experiment 'cifar10' cannot run: task.data = '{gone}'" in result.stderr
    assert not (tmp_path / "runs/cifar10").exists()


def test_costs_that_cannot_be_measured_end_with_one_line(tmp_path: Path) -> None:
    data = ["task.name=cifar10", f"task.data={tmp_path / 'none'}", "model.name=layerfed/vit"]
    result = cli.invoke(app, ["layers", *data, "model.weights=embedded", "budget.unit=flops"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: task.data = ")
    assert result.stderr.count("\n") == 1
