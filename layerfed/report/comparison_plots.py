"""The pictures of a comparison: the main score by round and against uplink, and the theory's terms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import StrMethodFormatter

from layerfed.exchange.scores import ACCURACY, Score
from layerfed.report.figures import Section
from layerfed.report.plots import (
    TERMS,
    fit,
    in_percent,
    legend_name,
    log_to_zero,
    over_rounds,
    save_picture,
)

__all__ = ["draw_accuracy", "draw_terms", "draw_uplink", "look", "mean_curve", "pareto_front"]

COLORS = tuple(matplotlib.colormaps["tab10"].colors)  # type: ignore[attr-defined]
# The first ten rows have solid lines in ten colours, the next ten have the same colours dashed, …
STYLES = ("-", "--", ":", "-.")
FILLS = ("full", "none", "left", "right")
MARKERS = "osD^v<>pP*"

Curve = Sequence[tuple[int, float]]


def draw_accuracy(sections: Sequence[Section], file: Path) -> Path:
    """Draw the main score by round, with a panel for each experiment and budget and a line a row.

    The band is the mean ± the standard deviation over seeds. A row without budgets is in every panel.
    """
    across, down = len(sections[0].budgets), len(sections)
    figure = Figure(figsize=(5.2 * across, 3.9 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for section, line in zip(sections, panels, strict=True):
        for budget, axes in zip(section.budgets, line, strict=True):
            shown: list[float] = []
            for number, row in enumerate(section.rows):
                if runs := section.entry(row, budget):
                    curve = mean_curve([run.curve for run in runs])
                    _curve(axes, curve, row, number)
                    shown += [*(curve[1] - curve[2]), *(curve[1] + curve[2])]
            fit(axes, shown, section.metric)
            axes.set(ylabel=f"test {section.metric.title}", title=f"{section.title} · {budget}")
            in_percent(axes, section.metric)
            over_rounds(axes)
            handles, _ = axes.get_legend_handles_labels()
            if axes.collections:
                name = f"band: mean ± standard deviation, {section.seeds} seeds"
                handles.append(Patch(color="0.5", alpha=0.3, lw=0, label=name))
            if handles:
                axes.legend(handles=handles, fontsize=8)
    return save_picture(figure, file)


def draw_terms(sections: Sequence[Section], file: Path) -> Path:
    """Draw the theory's terms by round, with a row of panels for each experiment and term.

    Panels are those of `draw_accuracy`. Lines are means over seeds on a logarithmic scale that ends in
    zero, on which bands would hide the lines. A term that is unknown is not drawn: E1 needs a probe of
    gradient norms.
    """
    across, down = len(sections[0].budgets), len(sections) * len(TERMS)
    figure = Figure(figsize=(5.2 * across, 3.4 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    pairs = [(section, key) for section in sections for key in TERMS]
    for (section, key), line in zip(pairs, panels, strict=True):
        runs_shown = (run for runs in section.runs.values() for run in runs)
        terms = (value for run in runs_shown for term in run.terms.values() for _, value in term)
        scale = max(terms, default=0.0)
        for budget, axes in zip(section.budgets, line, strict=True):
            positive = []
            for number, row in enumerate(section.rows):
                runs = section.entry(row, budget)
                known = [run.terms[key] for run in runs or () if run.terms[key]]
                if known:
                    rounds, mean, spread = mean_curve(known)
                    positive += mean[mean > 0].tolist()
                    _curve(axes, (rounds, mean, np.zeros_like(spread)), row, number)
            log_to_zero(axes, positive, scale)
            axes.set(ylabel=TERMS[key][0])
            axes.set_title(f"{section.title} · {budget}", fontsize=10)
            over_rounds(axes)
    drawn = {line.get_label(): line for axes in panels.flat for line in axes.lines}
    rows = [row for row in sections[0].rows if row in drawn]
    # The legend is beside the panels, since lines that end in zero fill the place inside.
    figure.legend([drawn[row] for row in rows], rows, loc="outside right upper", fontsize=9)
    return save_picture(figure, file, dpi=120)


def look(number: int) -> tuple[tuple[float, ...], str, str]:
    """Return the colour, line style and fill of a row, the same in all pictures."""
    again, color = divmod(number, len(COLORS))
    return COLORS[color], STYLES[again % len(STYLES)], FILLS[again % len(FILLS)]


def _curve(
    axes: Axes, curve: tuple[np.ndarray, np.ndarray, np.ndarray], row: str, number: int
) -> None:
    """Draw a row's mean with its band."""
    rounds, mean, spread = curve
    color, style, _ = look(number)
    axes.plot(rounds, mean, label=legend_name(row), color=color, linestyle=style, linewidth=1.5)
    if spread.any():
        axes.fill_between(rounds, mean - spread, mean + spread, color=color, alpha=0.15, lw=0)


def mean_curve(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rounds for which every run has a value, with mean and standard deviation over runs.

    Parameters
    ----------
    curves : Sequence[Sequence[tuple[int, float]]]
        The rounds and values of each run.

    Returns
    -------
    tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]
        Shape (rounds,) each; with one run, the standard deviation is 0.
    """
    values = [dict(curve) for curve in curves]
    rounds = sorted(set.intersection(*(set(curve) for curve in values)))
    table = np.array([[curve[r] for r in rounds] for curve in values])
    spread = table.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(len(rounds))
    return np.array(rounds), table.mean(axis=0), spread


def draw_uplink(sections: Sequence[Section], file: Path) -> Path:
    """Draw the final main score against the run's uplink, with a panel for each experiment.

    Each entry is a point, with its mean over seeds and a bar of one standard deviation. The line joins
    the Pareto front: the entries that no other entry beats in both.
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
            scores = [run.value for run in runs]
            points.append((sent, float(np.mean(scores))))
            color, _, fill = look(section.rows.index(row))
            axes.errorbar(
                *points[-1],
                yerr=np.std(scores, ddof=1) if len(scores) > 1 else None,
                color=color,
                fillstyle=fill,
                marker=MARKERS[section.budgets.index(budget) % len(MARKERS)] if budget else "X",
                capsize=2,
                linestyle="none",
                label=legend_name(f"{row} · {budget}" if budget else row),
            )
        if front := pareto_front(points, section.metric):
            axes.plot(
                *np.array(front).T,
                color="0.5",
                linewidth=1,
                linestyle="--",
                zorder=0,
                label="Pareto front",
            )
            axes.set_xscale("log")
            axes.tick_params(axis="x", which="both", labelsize=7)
            for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
                axis(StrMethodFormatter("{x:g}"))
            title = "bar: ± standard deviation over seeds" if section.seeds > 1 else None
            axes.legend(fontsize=7, ncols=2, title=title, title_fontsize=7)
        label = f"final test {section.metric.title}"
        axes.set(xlabel="uplink of the run, MB", ylabel=label, title=section.title)
        in_percent(axes, section.metric)
        axes.grid(alpha=0.3)
    return save_picture(figure, file)


def pareto_front(
    points: Sequence[tuple[float, float]], metric: Score = ACCURACY
) -> list[tuple[float, float]]:
    """Return the points (cost, score) that no cheaper point equals in score, cheapest first."""
    front: list[tuple[float, float]] = []
    sign = -1 if metric.higher_is_better else 1
    known = (point for point in points if not np.isnan(point[1]))
    for cost, score in sorted(known, key=lambda point: (point[0], sign * point[1])):
        if not front or metric.better(score, front[-1][1]):
            front.append((cost, score))
    return front
