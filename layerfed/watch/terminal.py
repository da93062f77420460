"""The live view of runs in a terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from layerfed.report import run_view
from layerfed.watch.overview import overview

__all__ = ["runs_table", "watch_terminal"]

BARS = "▁▂▃▄▅▆▇█"
STATES = {"running": "blue", "completed": "green", "failed": "red"}
# Rounds of one run that are shown, the newest last.
LAST = 12
REFRESH_SECONDS = 1.0


def watch_terminal(root: Path, console: Console) -> None:
    """Show runs until Ctrl-C, or one run until it ends; without a terminal, once.

    Parameters
    ----------
    root : Path
        A run folder, or a folder of run folders.
    console : rich.console.Console
    """
    if not console.is_terminal:
        console.print(_shown(root))
        return
    with Live(_shown(root), console=console, auto_refresh=False) as live:
        while _goes_on(root):
            time.sleep(REFRESH_SECONDS)
            live.update(_shown(root), refresh=True)


def _goes_on(root: Path) -> bool:
    if not (root / "summary.json").is_file():
        return True
    return any(run["status"] == "running" for run in overview(root))


def _shown(root: Path) -> Group:
    runs = overview(root)
    if (root / "summary.json").is_file() and runs:
        return Group(runs_table(runs), _rounds(root))
    return Group(runs_table(runs))


def runs_table(runs: Sequence[dict[str, Any]]) -> Table:
    """Return a table with a line for each run."""
    table = Table(expand=True, box=None, padding=(0, 1))
    for name in ("run", "status", "progress"):
        table.add_column(name, overflow="fold")
    for name in ("round", "score"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("by round", no_wrap=True)
    for name in ("uplink", "time", "failures"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        state = run["status"]
        table.add_row(
            escape(run["name"] if run["name"] != "." else run["task"]),
            Text(state, style=STATES.get(state, "yellow")),
            ProgressBar(total=max(1, run["rounds"]), completed=run["round"], width=16),
            f"{run['round']}/{run['rounds']}",
            _score(run["score"], run["percent"]),
            _sparkline(run["curve"]),
            f"{run['bytes_up'] / 1e6:,.1f} MB",
            f"{run['seconds']:,.0f} s",
            str(run["failures"]) if run["failures"] else "–",
        )
    if not runs:
        table.add_row("no run yet", *[""] * 8)
    return table


def _rounds(folder: Path) -> Table:
    """Return the last rounds of a run, each with its layers as a line of bars."""
    table = Table(title="last rounds", box=None, padding=(0, 1), title_justify="left")
    table.add_column("round", justify="right")
    for name in ("score", "loss", "time"):
        table.add_column(name, justify="right")
    table.add_column("layers, input first")
    try:
        view = run_view(folder)
    except (OSError, ValueError, KeyError):  # it is being written
        return table
    scores = view["scores"][view["metric"]["name"]]
    percent = view["metric"]["low"] == 0 and view["metric"]["high"] == 1
    shares = {
        row["round"]: share for row, share in zip(view["selection"], view["shares"], strict=True)
    }
    for n in range(max(1, len(view["rounds"]) - LAST), len(view["rounds"])):
        loss, number = view["losses"]["test loss"][n], view["rounds"][n]
        table.add_row(
            str(number),
            _score(scores[n], percent),
            "–" if loss is None else f"{loss:.4g}",
            f"{view['seconds'][n - 1]:.1f} s",
            "".join(_bar(share) if share else "·" for share in shares.get(number, ())),
        )
    return table


def _score(value: float | None, percent: bool) -> str:
    if value is None:
        return "–"
    return f"{value:.2%}" if percent else f"{value:.4g}"


def _bar(share: float) -> str:
    return BARS[min(len(BARS) - 1, int(share * len(BARS)))]


def _sparkline(values: Sequence[float], width: int = 24) -> str:
    """Return a line of bars from the lowest to the highest value, thinned to a width."""
    step = max(1, -(-len(values) // width))
    shown = [*values[::-1][::step]][::-1]  # the newest is always there
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    span = high - low if high - low > 1e-9 * max(abs(high), 1e-12) else 1.0
    return "".join(_bar((value - low) / span) for value in shown)
