"""What a run shows while it goes on: lines, a bar in a terminal, and lines of JSON for programs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from layerfed.cli import app
from layerfed.runs import JsonLines, ProgressLine, progress, read_lines
from layerfed.runs.records import RoundRecord
from tests.tiny_task import TinyTask

cli = CliRunner()
QUICK = [
    *("task.name=tests.tiny_task:TinyTask", "federation.rounds=2", "federation.clients=4"),
    *("train.local-steps=1", "train.batch-size=8", "run.name=x"),
]


def shown(terminal: bool) -> str:
    """Show the first two of four rounds, which take ten seconds each; return what was written."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, color_system=None)
    with ProgressLine(console) as line:
        line.on_start(4, RoundRecord(0, accuracy=0.1))
        for number in (1, 2):
            for phase in ("probe", "train"):
                line.on_phase(number, phase)
                for done in (1, 2, 3):
                    line.on_reply(number, done, 3)
            line.on_round(RoundRecord(number, accuracy=number / 4, replies=3, seconds=10.0))
            line._progress.refresh()
    return stream.getvalue()


@pytest.fixture
def ten_seconds_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the second round: 20 seconds have passed."""

    class Passed(progress.Clock):
        def left(self, finished: float) -> float | None:
            self.began = progress.time.monotonic() - 10.0 * (finished - self.done)
            return super().left(finished)

    monkeypatch.setattr(progress, "Clock", Passed)


LINES = [
    "round 0/4  accuracy 10.0%",
    "round 1/4  accuracy 25.0%  train loss –  clients 3  10.0 s",
    "round 2/4  accuracy 50.0%  train loss –  clients 3  10.0 s",
]


def test_without_a_terminal_there_are_plain_lines_alone(ten_seconds_a_round: None) -> None:
    assert shown(terminal=False).splitlines() == LINES


def test_in_a_terminal_a_bar_with_phase_clients_and_time_lives_below_the_lines(
    ten_seconds_a_round: None,
) -> None:
    found = shown(terminal=True)
    for line in LINES:
        assert line in found
    assert "round 2/4  train" in found
    assert "3/3 clients" in found
    assert "about 0:20 left" in found
    # The bar is redrawn under the last line, and gone in the end.
    assert found.index(LINES[2]) < found.rindex("about 0:20 left")
    assert "\x1b[2K" in found[found.rindex("about 0:20 left") :]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7384, "2:03:04")]
)
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_quiet_prints_the_folder_alone(tmp_path: Path) -> None:
    result = cli.invoke(app, ["run", *QUICK, "--quiet", "--dir", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    assert (result.stdout, result.stderr) == (f"{tmp_path / 'x'}\n", "")


def test_json_lines_are_alone_on_standard_output(tmp_path: Path) -> None:
    result = cli.invoke(app, ["run", *QUICK, "--json-lines", "--dir", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    start, *rounds, end = [json.loads(line) for line in result.stdout.splitlines()]
    assert start["event"] == "start"
    assert (start["folder"], start["rounds"], start["done"]) == (str(tmp_path / "x"), 2, 0)
    assert (
        start["accuracy"]
        == json.loads((tmp_path / "x/summary.json").read_text())["initial_accuracy"]
    )
    metrics = read_lines(tmp_path / "x/metrics.jsonl")
    assert rounds == [{"event": "round", **row} for row in metrics]
    summary = json.loads((tmp_path / "x/summary.json").read_text())
    assert end == {"event": "end", "folder": str(tmp_path / "x"), **summary}
    assert "round 2/2" in result.stderr
    both = ["run", *QUICK[:-1], "run.name=y", "--json-lines", "--quiet", "--dir", str(tmp_path)]
    again = cli.invoke(app, both)
    assert len(again.stdout.splitlines()) == 4
    assert again.stderr == ""


def test_a_failed_run_ends_its_lines_too(tmp_path: Path) -> None:
    arguments = ["run", *QUICK, "train.lr=1e30", "--json-lines", "--dir", str(tmp_path)]
    result = cli.invoke(app, arguments)
    assert result.exit_code == 1
    end = json.loads(result.stdout.splitlines()[-1])
    assert (end["event"], end["status"]) == ("end", "failed")


class Chatty(TinyTask):
    """A task whose model prints a line when it is built."""

    def build_model(self) -> nn.Module:
        print("loading the model")
        return super().build_model()


@pytest.mark.parametrize("option", ["--quiet", "--json-lines"])
def test_what_a_task_prints_is_not_on_standard_output(tmp_path: Path, option: str) -> None:
    chatty = ["task.name=tests.runs.test_progress:Chatty", *QUICK[1:]]
    result = cli.invoke(app, ["run", *chatty, option, "--dir", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    assert "loading the model" not in result.stdout
    assert "loading the model" in result.stderr


def test_a_reader_that_goes_away_stops_no_run() -> None:
    class Gone(io.StringIO):
        tried = 0

        def write(self, text: str) -> int:
            self.tried += 1
            raise BrokenPipeError(32, "Broken pipe")

    gone = Gone()
    lines = JsonLines(gone)
    for number in (1, 2):
        lines.on_round(RoundRecord(number))
    assert gone.tried == 1, "nothing more is written after the first failure"
