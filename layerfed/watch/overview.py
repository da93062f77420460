"""What a list of runs shows of each run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from layerfed.report import metric_of, run_folders
from layerfed.report.figures import score_curves
from layerfed.runs.files import read_json, read_lines

__all__ = ["mark", "overview"]

# Files whose change makes a page older than its run. A round ends with a new summary.
CHANGING = ("summary.json", "evaluation.json")


def mark(folders: Iterable[Path]) -> str:
    """Return a text that changes when one of these runs has news, or when there are other runs."""
    found = []
    for folder in folders:
        for name in CHANGING:
            try:
                state = (folder / name).stat()
            except OSError:
                continue
            found.append(hash((str(folder), name, state.st_mtime_ns, state.st_ino)))
    return f"{hash(tuple(found)) & (2**64 - 1):x}"


def overview(root: Path) -> list[dict[str, Any]]:
    """Return a line for each run at or below a folder.

    A folder without a whole summary, as one that is being made, is left out.
    """
    lines = []
    for folder in run_folders(root):
        try:
            line = _line(folder, mark([folder]))
        except (OSError, ValueError, KeyError):
            continue
        lines.append({"name": folder.relative_to(root).as_posix(), **line})
    return lines


@lru_cache(maxsize=4096)
def _line(folder: Path, _mark: str) -> dict[str, Any]:
    summary, config = read_json(folder / "summary.json"), read_json(folder / "config.json")
    file, metric = folder / "metrics.jsonl", metric_of(summary)
    rows = read_lines(file) if file.exists() else []

    curve = score_curves(summary, rows).get(metric["name"], ())
    known = [value for _, value in curve if math.isfinite(value)]
    return {
        "status": summary["status"],
        "task": summary["task"],
        "strategy": summary["strategy"],
        "seed": summary["seed"],
        "engine": summary["engine"],
        "round": summary["rounds"],
        "rounds": config["federation.rounds"],
        "metric": metric["name"],
        "percent": metric["low"] == 0 and metric["high"] == 1,
        "score": known[-1] if known else None,
        "curve": known,
        "bytes_up": summary["bytes_up"],
        "bytes_full_up": summary["bytes_full_up"],
        "seconds": summary["seconds"],
        "failures": summary["failures"],
    }
