"""The tables that a command prints: a run's final figures, its classes, and its data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from layerfed.exchange.scores import ACCURACY, Score, score_of
from layerfed.runs.files import read_json

__all__ = ["class_table", "data_table", "run_table"]

# What fits on a screen.
MOST_ROWS, MOST_COLUMNS = 20, 12


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


def _other_scores(scores: Mapping[str, float | None], metric: Score) -> dict[str, str]:
    """Return the line with the other scores, whose bounds only the task knows."""
    others = {name: value for name, value in scores.items() if name != metric.name}
    shown = (
        f"{Score(name).title} {'–' if value is None else f'{value:.4g}'}"
        for name, value in others.items()
    )
    return {"other scores": ", ".join(shown)} if others else {}


def _spreads(result: Mapping[str, Any], metric: Score) -> dict[str, str]:
    """Return a line each on how the main score differs between groups, and between clients."""
    return {
        f"by {key.rstrip('s')}": f"worst {one['worst']} with {metric.text(one['value'])}; range "
        f"{metric.text(one['range'])}, standard deviation {metric.text(one['std'])}, "
        f"{len(result[key])} {key}"
        for key, one in result.get("spread", {}).items()
    }


def class_table(folder: Path) -> Table | None:
    """Return the table by class of the final model; None if the run has none that can be read."""
    file = folder / "evaluation.json"
    rows = read_json(file).get("per_class", []) if file.exists() else []
    if not 0 < len(rows) <= MOST_ROWS:
        return None
    table = Table(box=None)
    table.add_column("class")
    for key in ("precision", "recall", "f1", "support"):
        table.add_column(Score(key).title, justify="right")
    for row in rows:
        shares = (f"{row[key]:.1%}" for key in ("precision", "recall", "f1"))
        table.add_row(Text(row["class"]), *shares, str(row["support"]))
    return table


def data_table(data: Mapping[str, Any]) -> Table:
    """Return the examples of each client, and of the test set, by group and by class.

    Parameters
    ----------
    data : Mapping[str, Any]
        The content of `data.json`.

    Notes
    -----
    Of many clients the first are shown, and of many classes how many of them a client has.
    """
    classes, groups = data["classes"], data["groups"]
    each = len(classes) <= MOST_COLUMNS
    table = Table(box=None)
    for name in (
        "",
        "examples",
        *(["groups"] if groups else ()),
        *(classes if each else ["classes"]),
    ):
        table.add_column(Text(name), justify="left" if name in ("", "groups") else "right")

    def add(name: str, row: Mapping[str, Any]) -> None:
        cells: list[str | Text] = [name, f"{row['examples']:,}"]
        if groups:
            cells.append(Text(", ".join(f"{group} {n:,}" for group, n in row["groups"].items())))
        counts = row["classes"]
        held = f"{sum(1 for n in counts if n)} of {len(classes)}"
        table.add_row(*cells, *((f"{n:,}" for n in counts) if each else [held]))

    for row in data["clients"][:MOST_ROWS]:
        add(f"client {row['partition']}", row)
    if (more := len(data["clients"]) - MOST_ROWS) > 0:
        table.add_row(f"… {more} more")
    add("test set", data["test"])
    return table


def run_table(folder: Path) -> Table:
    """Return the final figures of a run folder."""
    summary = read_json(folder / "summary.json")
    table = Table(show_header=False, box=None)

    metric = score_of(summary.get("metric"))
    before = summary.get("initial_scores") or {ACCURACY.name: summary["initial_accuracy"]}
    after = summary.get("scores", {ACCURACY.name: summary["accuracy"]})
    best = summary.get("best", {"value": summary.get("best_accuracy")}) or {"value": None}
    file = folder / "evaluation.json"
    result = read_json(file) if file.exists() else {}
    rows = {
        "status": summary["status"],
        **({"error": summary["error"]} if summary.get("error") else {}),
        metric.title: f"{metric.text(after.get(metric.name))} (best {metric.text(best['value'])}, "
        f"before training {metric.text(before.get(metric.name))})",
        **_other_scores(after, metric),
        **_spreads(result, metric),
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
