"""The pictures of a comparison: accuracy by round, and what accuracy costs in uplink."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from layerfed.report.figures import RunFigures, Section

__all__ = ["draw_accuracy", "draw_uplink", "mean_curve", "pareto_front"]

COLORS = tuple(matplotlib.colormaps["tab10"].colors)  # type: ignore[attr-defined]
MARKERS = "osD^v<>pP*"


def draw_accuracy(sections: Sequence[Section], file: Path) -> Path:
    """Draw accuracy by round: a panel an experiment and budget, a line a row, a band over seeds.

    The band is the mean ± the standard deviation. A row without budgets is in every panel.
    """
    across, down = len(sections[0].budgets), len(sections)
    figure = Figure(figsize=(5.2 * across, 3.9 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for section, line in zip(sections, panels, strict=True):
        for budget, axes in zip(section.budgets, line, strict=True):
            for number, row in enumerate(section.rows):
                if runs := section.entry(row, budget):
                    _curve(axes, runs, row, _color(number))
            axes.set(xlabel="round", ylabel="test accuracy", title=f"{section.title} · {budget}")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)
    return file


def _color(number: int) -> tuple[float, ...]:
    color: tuple[float, ...] = COLORS[number % len(COLORS)]
    return color


def _curve(axes: Axes, runs: Sequence[RunFigures], row: str, color: tuple[float, ...]) -> None:
    rounds, mean, spread = mean_curve(runs)
    axes.plot(rounds, mean, label=row, color=color, linewidth=1.5)
    if len(runs) > 1:
        axes.fill_between(rounds, mean - spread, mean + spread, color=color, alpha=0.15, lw=0)


def mean_curve(runs: Sequence[RunFigures]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rounds that every run was evaluated in, with mean and standard deviation over runs.

    Returns
    -------
    tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]
        Shape (rounds,) each; with one run, the standard deviation is 0.
    """
    curves = [dict(run.curve) for run in runs]
    rounds = sorted(set.intersection(*(set(curve) for curve in curves)))
    table = np.array([[curve[r] for r in rounds] for curve in curves])
    spread = table.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(len(rounds))
    return np.array(rounds), table.mean(axis=0), spread


def draw_uplink(sections: Sequence[Section], file: Path) -> Path:
    """Draw final accuracy against the run's uplink: a panel an experiment, a point an entry.

    Means over seeds, with bars of a standard deviation. The line joins entries that none beats in both
    (the Pareto front).
    """
    figure = Figure(figsize=(6.4 * len(sections), 4.6), layout="constrained")
    for section, axes in zip(
        sections, figure.subplots(1, len(sections), squeeze=False)[0], strict=True
    ):
        points = []
        for (row, budget), runs in section.runs.items():
            if not runs:
                continue
            sent = float(np.mean([run.bytes_up for run in runs])) / 1e6
            scores = [run.accuracy for run in runs]
            points.append((sent, float(np.mean(scores))))
            axes.errorbar(
                *points[-1],
                yerr=np.std(scores, ddof=1) if len(scores) > 1 else None,
                color=_color(section.rows.index(row)),
                marker=MARKERS[section.budgets.index(budget) % len(MARKERS)] if budget else "X",
                capsize=2,
                linestyle="none",
                label=f"{row} · {budget}" if budget else row,
            )
        if points:
            front = np.array(pareto_front(points))
            axes.plot(*front.T, color="0.5", linewidth=1, linestyle="--", zorder=0)
            axes.set_xscale("log")
            for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
                axis(StrMethodFormatter("{x:g}"))
            axes.legend(fontsize=7, ncols=2)
        axes.set(xlabel="uplink of the run, MB", ylabel="final test accuracy", title=section.title)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
    return file


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (cost, score) than which none is cheaper and scores as much, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front
