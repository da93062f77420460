"""Observers that show a run's progress: a live line in a terminal, else one log line a round."""

from __future__ import annotations

import time
from logging import INFO
from typing import Self

from flwr.common.logger import log
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from layerfed.runs.records import Observer, RoundRecord

__all__ = ["LogLines", "ProgressLine"]


def _privacy(record: RoundRecord) -> str:
    """Return the end of a progress line with a run's ε; empty without differential privacy."""
    return "" if record.epsilon is None else f", ε {record.epsilon:.3g}"


def _loss(record: RoundRecord) -> str:
    loss = record.metrics["train_loss"]
    return "–" if loss is None else f"{loss:.3f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


class LogLines(Observer):
    """An observer that logs one line a round in Flower's log, for `flwr run` and real federations."""

    def __init__(self) -> None:
        self._rounds = self._done = 0
        self._began = time.monotonic()

    def on_start(self, rounds: int, accuracy: float | None, done: int = 0) -> None:
        """Log the model's accuracy at the start."""
        self._rounds, self._done, self._began = rounds, done, time.monotonic()
        when = f"after round {done}" if done else "before the first round"
        log(INFO, "accuracy %s: %s", when, _percent(accuracy))

    def on_round(self, record: RoundRecord) -> None:
        """Log the round's figures and the remaining time."""
        passed = time.monotonic() - self._began
        log(
            INFO,
            "[round %d/%d] accuracy %s, loss %s, %d clients, %d failed, %.2f MB up%s, %.1f s; "
            "about %.0f s left",
            record.round,
            self._rounds,
            _percent(record.accuracy),
            _loss(record),
            record.replies,
            len(record.failures),
            record.ledger.total().up / 1e6,
            _privacy(record),
            record.seconds,
            passed / (record.round - self._done) * (self._rounds - record.round),
        )


class ProgressLine(Observer):
    """An observer that shows a live line with round, phase, accuracy and remaining time.

    If standard error is no terminal, it prints one plain line for each round.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[phase]:<9}"),
            TextColumn("accuracy {task.fields[accuracy]}"),
            TextColumn("·"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None, phase="start", accuracy="–")
        self._rounds = 0

    def __enter__(self) -> Self:
        """Show the line."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the line as it is."""
        self._progress.stop()

    def on_start(self, rounds: int, accuracy: float | None, done: int = 0) -> None:
        """Take the number of rounds, the number of finished ones, and the first accuracy."""
        self._rounds = rounds
        self._progress.update(self._task, total=rounds, completed=done, accuracy=_percent(accuracy))

    def on_phase(self, server_round: int, phase: str) -> None:
        """Show the phase."""
        self._progress.update(self._task, phase=phase)

    def on_round(self, record: RoundRecord) -> None:
        """Advance by a round."""
        shown = _percent(record.accuracy) + _privacy(record)
        self._progress.update(self._task, advance=1)
        if record.accuracy is not None:
            self._progress.update(self._task, accuracy=shown)
        if not self._console.is_terminal:
            self._console.print(
                f"round {record.round}/{self._rounds}  accuracy {shown}  "
                f"train loss {_loss(record)}  clients {record.replies}  "
                f"{record.seconds:.1f} s",
                highlight=False,
            )
