"""The two pictures of a run: accuracy per round, and which layers were trained when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.colors import LogNorm
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
    """Draw who trained what and, where a probe was made, the gradient norms behind the choice."""
    names = selections[0]["layers"]
    probed = "grad_norm_sq" in selections[0]["statistics"]
    height = min(max(2.8, 0.24 * len(names) + 1.3), 14)
    figure = Figure(figsize=(10.5 if probed else 6.4, height), layout="constrained")
    axes = figure.subplots(1, 2 if probed else 1, sharey=True, squeeze=False)[0]
    figure.suptitle(title)

    shown = {
        "interpolation": "nearest",
        "origin": "lower",
        "aspect": "auto",
        "extent": (0.5, len(selections) + 0.5, -0.5, len(names) - 0.5),
    }
    image = axes[0].imshow(selection_shares(selections).T, cmap="Blues", vmin=0, vmax=1, **shown)
    figure.colorbar(image, ax=axes[0], format=PercentFormatter(1.0))
    axes[0].set_title("share of the round's clients that train it", fontsize=10)
    step = -(-len(names) // 40)
    axes[0].set_yticks(range(0, len(names), step), names[::step], fontsize=8)
    axes[0].set(ylabel="layer (input at the bottom)")
    if probed:
        norms = [np.mean(row["statistics"]["grad_norm_sq"], axis=0) for row in selections]
        positive = np.maximum(np.sqrt(norms), np.finfo(float).tiny)
        image = axes[1].imshow(positive.T, cmap="viridis", norm=LogNorm(), **shown)
        figure.colorbar(image, ax=axes[1])
        axes[1].set_title("probed gradient norm (r.m.s. over clients)", fontsize=10)
    for ax in axes:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(xlabel="round")
    figure.savefig(file, dpi=150)
    return file
