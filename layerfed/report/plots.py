"""The pictures of a run: accuracy per round, the layers trained in each round, and the error terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from layerfed.files import whole
from layerfed.runs.files import read_json, read_lines

__all__ = ["draw_run", "over_rounds", "save_picture", "selection_shares"]

# The terms of `layerfed.server.theory` in metrics.jsonl, each with its label and colour.
TERMS = {
    "e1": (r"$\hat E_1$: layers that no client trains", "#c05a1a"),
    "e2": (r"$\hat E_2$: differences between clients", "#1f5fa8"),
    "e2_masks": (r"part of $\hat E_2$ from masks", "#7fb0dd"),
}


def save_picture(figure: Figure, file: Path, dpi: int = 150) -> Path:
    """Write a PNG in place of what is there; return its path."""
    with whole(file) as beside:
        figure.savefig(beside, dpi=dpi, format="png")
    return file


def over_rounds(axes: Axes) -> None:
    """Give an axis whole rounds, and a grid."""
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def selection_shares(rows: list[dict[str, Any]]) -> np.ndarray:
    """Return the share of a round's clients that updated each block, shape (rounds, L).

    A layer that a client trains need not be updated: replies fail, and `fedtlu` leaves layers out
    afterwards.
    """
    tables = (np.asarray(row.get("updated", row["masks"]), dtype=float) for row in rows)
    return np.array([table.mean(axis=0) for table in tables])


def draw_run(folder: Path) -> list[Path]:
    """Draw a run folder's pictures from its files and return their paths.

    The pictures are `accuracy.png` and `layers.png`, and `theory.png` if a term of
    `layerfed.server.theory` is known.

    Raises
    ------
    OSError, ValueError
        If the folder is no run folder, one of its files is damaged, or no round was finished.
    """
    summary = read_json(folder / "summary.json")
    lines = [folder / "metrics.jsonl", folder / "selection.jsonl"]
    metrics, selections = (read_lines(file) if file.exists() else [] for file in lines)
    if not metrics or not selections:
        ended = summary.get("error") or f"its status is '{summary.get('status')}'"
        raise ValueError(f"{folder}: no round was finished; {ended}")
    title = f"{summary['task']} · {summary['strategy']} · seed {summary['seed']}"
    pictures = [
        _accuracy(metrics, summary, title, folder / "accuracy.png"),
        _layers(selections, title, folder / "layers.png"),
    ]
    if any(row.get(key) is not None for row in metrics for key in TERMS):
        pictures.append(_theory(metrics, title, folder / "theory.png"))
    return pictures


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
    axes.set(ylabel="test accuracy", title=title, ylim=(0, 1.05))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    over_rounds(axes)
    return save_picture(figure, file)


def _theory(metrics: list[dict[str, Any]], title: str, file: Path) -> Path:
    """Draw the estimates of the error floor's two terms, on a logarithmic scale that ends in zero."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for key, (label, color) in TERMS.items():
        rows = [row for row in metrics if row.get(key) is not None]
        if key == "e2_masks" and all(row[key] == row["e2"] for row in rows):
            continue  # if every client takes part, it equals E2 and would hide it
        axes.plot(
            [row["round"] for row in rows],
            [row[key] for row in rows],
            label=label,
            color=color,
            marker="o",
            markersize=3,
            linewidth=1.5,
        )
    positive = [row[key] for key in TERMS for row in metrics if row.get(key)]
    if positive:
        axes.set_yscale("symlog", linthresh=min(positive), linscale=0.5)
    axes.set(ylabel="estimate, in squared gradients", title=title, ylim=(0, None))
    over_rounds(axes)
    axes.legend()
    return save_picture(figure, file)


def _layers(selections: list[dict[str, Any]], title: str, file: Path) -> Path:
    """Draw the layers that were trained and, if probed, the gradient norms behind the choice."""
    names = selections[0]["layers"]
    probed = any("grad_norm_sq" in row["statistics"] for row in selections)
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
    axes[0].set_title("share of the round's clients that updated it", fontsize=10)
    step = -(-len(names) // 40)
    axes[0].set_yticks(range(0, len(names), step), names[::step], fontsize=8)
    axes[0].set(ylabel="layer (input at the bottom)")
    if probed:
        # Rounds without a probe are blank.
        unknown = [[np.nan] * len(names)]
        tables = [row["statistics"].get("grad_norm_sq", unknown) for row in selections]
        norms = [np.mean(table, axis=0) for table in tables]
        positive = np.maximum(np.sqrt(norms), np.finfo(float).tiny)
        image = axes[1].imshow(positive.T, cmap="viridis", norm=LogNorm(), **shown)
        figure.colorbar(image, ax=axes[1])
        axes[1].set_title("probed gradient norm (r.m.s. over clients)", fontsize=10)
    for ax in axes:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(xlabel="round")
    return save_picture(figure, file)
