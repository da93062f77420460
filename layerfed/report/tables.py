"""The table of a run's final figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from layerfed.runs.files import read_json

__all__ = ["run_table"]


def _size(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def _of_full(count: float, full: float) -> str:
    return f"{_size(count)} ({count / full:.1%} of full-model exchange)" if full else _size(count)


def _privacy(summary: Mapping[str, Any]) -> str:
    if summary["epsilon"] is None:
        return "nothing revealed yet"
    return (
        f"ε = {float(summary['epsilon']):.4g} at δ = {summary['delta']:g}, by client, for "
        f"{summary['epsilon_covers']}"
    )


def run_table(folder: Path) -> Table:
    """Return the final figures of a run folder."""
    summary = read_json(folder / "summary.json")
    table = Table(show_header=False, box=None)

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{value:.2%}"

    rows = {
        "status": summary["status"],
        "accuracy": f"{percent(summary['accuracy'])} (best {percent(summary['best_accuracy'])}, "
        f"before training {percent(summary['initial_accuracy'])})",
        "uplink": _of_full(summary["bytes_up"], summary["bytes_full_up"]),
        "downlink": _of_full(summary["bytes_down"], summary["bytes_full_down"]),
        "compute": f"{summary['flops'] / 1e12:.3f} TFLOPs training, "
        f"{summary['flops_probe'] / 1e12:.3f} TFLOPs probing",
        "time": f"{summary['seconds']:.1f} s for {summary['rounds']} rounds ({summary['engine']})",
    }
    if summary.get("delta") is not None:
        rows["privacy"] = _privacy(summary)
    if summary["failures"]:
        rows["failures"] = f"{summary['failures']} replies missing or refused: see metrics.jsonl"
    for name, value in rows.items():
        table.add_row(name, value)
    return table
