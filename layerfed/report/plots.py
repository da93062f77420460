"""The two pictures of a run: accuracy per round, and which layers were trained when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from layerfed.runs.folder import read_lines

__all__ = ["draw_run", "selection_shares"]


def selection_shares(rows: list[dict[str, Any]]) -> np.ndarray:
    """Return the share of a round's clients that trained each layer, shape (rounds, L)."""
    return np.array([np.asarray(row["masks"], dtype=float).mean(axis=0) for row in rows])


def draw_run(folder: Path) -> list[Path]:
    """Draw `accuracy.png` and `layers.png` from a run folder's files; return their paths."""
    metrics = read_lines(folder / "metrics.jsonl")
    selections = read_lines(folder / "selection.jsonl")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    title = f"{summary['task']} · {summary['strategy']} · seed {summary['seed']}"
    return [
        _accuracy(metrics, summary, title, folder / "accuracy.png"),
        _layers(selections, title, folder / "layers.png"),
    ]


def _accuracy(
    metrics: list[dict[str, Any]], summary: dict[str, Any], title: str, file: Path
) -> Path:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    rounds = [row["round"] for row in metrics if row["accuracy"] is not None]
    scores = [row["accuracy"] for row in metrics if row["accuracy"] is not None]
    if summary["initial_accuracy"] is not None:
        rounds, scores = [0, *rounds], [summary["initial_accuracy"], *scores]
    axes.plot(rounds, scores, color="#1f5fa8", marker="o", markersize=3, linewidth=1.5)
    if scores:
        axes.annotate(
            f"{scores[-1]:.1%}",
            (rounds[-1], scores[-1]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            color="#1f5fa8",
        )
    axes.set(xlabel="round", ylabel="test accuracy", title=title, ylim=(0, 1.05))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
    return file


def _layers(selections: list[dict[str, Any]], title: str, file: Path) -> Path:
    shares = selection_shares(selections)
    names = selections[0]["layers"]
    height = max(2.6, 0.26 * len(names) + 1.2)
    figure = Figure(figsize=(6.4, min(height, 14)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        shares.T,
        origin="lower",
        aspect="auto",
        cmap="Blues",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(0.5, len(selections) + 0.5, -0.5, len(names) - 0.5),
    )
    step = -(-len(names) // 40)
    axes.set_yticks(range(0, len(names), step), [name for name in names[::step]], fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="round", ylabel="layer (input at the bottom)", title=title)
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1.0))
    bar.set_label("share of the round's clients training the layer")
    figure.savefig(file, dpi=150)
    return file
