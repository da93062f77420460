"""Observers that show a run's progress: in Flower's log, in a terminal, or to a program."""

from __future__ import annotations

import json
import time
from logging import INFO, WARNING
from pathlib import Path
from typing import Any, Self, TextIO

from flwr.common.logger import log
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from layerfed.runs.files import read_json
from layerfed.runs.folder import metrics_line
from layerfed.runs.records import Observer, RoundRecord

__all__ = ["Clock", "JsonLines", "LogLines", "ProgressLine", "RunsBar", "duration"]


def _privacy(record: RoundRecord) -> str:
    """Return the end of a progress line with a run's ε; empty without differential privacy."""
    return "" if record.epsilon is None else f", ε {record.epsilon:.3g}"


def _loss(record: RoundRecord) -> str:
    loss = record.metrics["train_loss"]
    return "–" if loss is None else f"{loss:.3f}"


def _score(record: RoundRecord) -> str:
    return record.metric.text(record.value, digits=1)


class Clock:
    """The time that is left, if the remaining rounds take as long as those of this process so far."""

    def __init__(self, rounds: int = 0, done: int = 0) -> None:
        self.rounds, self.done, self.began = rounds, done, time.monotonic()

    def left(self, finished: float) -> float | None:
        """Return seconds, given the number of finished rounds; None before the first one."""
        here = finished - self.done
        passed = time.monotonic() - self.began
        return passed / here * (self.rounds - finished) if here >= 1 else None


class LogLines(Observer):
    """An observer that logs one line a round in Flower's log, for `flwr run` and real federations."""

    def __init__(self) -> None:
        self._clock = Clock()

    def on_inputs(self, summary: str) -> None:
        """Log what was chosen for the model's inputs."""
        if summary:
            log(INFO, "%s", summary)

    def on_start(self, rounds: int, before: RoundRecord, done: int = 0) -> None:
        """Log the model's main score at the start."""
        self._clock = Clock(rounds, done)
        when = f"after round {done}" if done else "before the first round"
        log(INFO, "%s %s: %s", before.metric.name, when, _score(before))

    def on_round(self, record: RoundRecord) -> None:
        """Log the round's figures and the remaining time."""
        log(
            INFO,
            "[round %d/%d] %s %s, loss %s, %d clients, %d failed, %.2f MB up%s, %.1f s; "
            "about %.0f s left",
            record.round,
            self._clock.rounds,
            record.metric.name,
            _score(record),
            _loss(record),
            record.replies,
            len(record.failures),
            record.ledger.total().up / 1e6,
            _privacy(record),
            record.seconds,
            self._clock.left(record.round),
        )


def _bar(console: Console, *texts: str) -> Progress:
    """Return a bar that is there while it is started; without a terminal it shows nothing."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        *map(TextColumn, texts),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


class RunsBar:
    """A bar with the finished runs of a comparison, in a terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = _bar(console)
        self._bar = self._progress.add_task("prepare", total=None)

    def __enter__(self) -> Self:
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away."""
        self._progress.stop()

    def show(self, done: int, total: int, text: str) -> None:
        """Show the number of finished runs, and a text that says it."""
        self._progress.update(self._bar, total=total, completed=done, description=text)


class ProgressLine(Observer):
    """An observer that prints one line a round, and in a terminal a bar below.

    The bar has the phase, the clients that are done with it, and the time left.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._clock = Clock()
        self._progress = _bar(console, "{task.fields[clients]}", "{task.fields[left]}")
        self._bar = self._progress.add_task("start", total=None, clients="", left="")

    def __enter__(self) -> Self:
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away; the lines stay."""
        self._progress.stop()

    def on_inputs(self, summary: str) -> None:
        """Print what was chosen for the model's inputs."""
        if summary:
            self._console.print(summary, markup=False, highlight=False)

    def on_start(self, rounds: int, before: RoundRecord, done: int = 0) -> None:
        """Print the first main score, and take the number of rounds and of finished ones."""
        self._clock = Clock(rounds, done)
        self._print(f"round {done}/{rounds}  {before.metric.name} {_score(before)}")
        self._progress.update(self._bar, total=rounds, completed=done)

    def on_phase(self, server_round: int, phase: str) -> None:
        """Show the round and its phase."""
        what = f"round {server_round}/{self._clock.rounds}  {phase:<8}" if server_round else phase
        self._progress.update(self._bar, description=what, clients="")

    def on_reply(self, server_round: int, done: int, asked: int) -> None:
        """Show the number of clients that have answered."""
        self._progress.update(self._bar, clients=f"{done}/{asked} clients")

    def on_round(self, record: RoundRecord) -> None:
        """Print the round's line and advance the bar."""
        self._print(
            f"round {record.round}/{self._clock.rounds}  "
            f"{record.metric.name} {_score(record)}{_privacy(record)}  "
            f"train loss {_loss(record)}  clients {record.replies}  {record.seconds:.1f} s"
        )
        left = self._clock.left(record.round) or 0.0
        self._progress.update(
            self._bar, completed=record.round, left=f"about {duration(left)} left"
        )

    def on_end(self, record: RoundRecord) -> None:
        """Say so if the run ends before its last round."""
        if record.round < self._clock.rounds:
            self._print(f"ended after round {record.round}, as asked")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Return seconds as minutes and seconds, with hours if there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class JsonLines(Observer):
    """An observer that writes one JSON object a line: start, rounds, and end.

    A round's object is its line of `metrics.jsonl`; that of the end is `summary.json`. Each has the
    key `event`, which says what it is.

    Parameters
    ----------
    stream : TextIO
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO | None = stream
        self.folder = Path()
        """The run folder, which the caller sets once it exists."""

    def on_start(self, rounds: int, before: RoundRecord, done: int = 0) -> None:
        """Print the run folder, the numbers of rounds, and the scores of the model so far."""
        more = {"accuracy": before.accuracy, "scores": dict(before.scores)}
        self._print("start", folder=str(self.folder), rounds=rounds, done=done, **more)

    def on_round(self, record: RoundRecord) -> None:
        """Print the round's line."""
        self._print("round", **metrics_line(record))

    def on_close(self, status: str) -> None:
        """Print the summary."""
        self._print("end", folder=str(self.folder), **read_json(self.folder / "summary.json"))

    def _print(self, event: str, **content: Any) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(json.dumps({"event": event, **content}) + "\n")
            self._stream.flush()
        except BrokenPipeError:  # a reader that goes away is no reason to stop training
            self._stream = None
            log(WARNING, "nobody reads the lines any more; the run goes on, in its folder")
