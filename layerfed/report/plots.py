"""The pictures of a run: scores and layers by round, the partition of the data, and errors by class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter

from layerfed.exchange.scores import Score, score_of
from layerfed.files import whole
from layerfed.report.figures import score_curves
from layerfed.runs.files import read_json, read_lines

__all__ = [
    "TERMS",
    "draw_partition",
    "draw_run",
    "fit",
    "in_percent",
    "legend_name",
    "log_to_zero",
    "over_rounds",
    "save_picture",
    "selection_shares",
]

# The share of the largest value below which a value is rounding noise.
NOISE = 1e-9
# The terms of `layerfed.server.theory` in metrics.jsonl, each with its label and colour.
TERMS = {
    "e1": ("Ê₁: layers that no client trains", "#c05a1a"),
    "e2": ("Ê₂: differences between clients", "#1f5fa8"),
    "e2_masks": ("part of Ê₂ from masks", "#7fb0dd"),
}


# No file has a date, so that equal pictures are equal files.
UNDATED = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
FORMS = tuple(UNDATED)


def save_picture(figure: Figure, file: Path, dpi: int = 150, forms: Sequence[str] = FORMS) -> Path:
    """Write a picture in place of what is there; return the PNG's path.

    Parameters
    ----------
    figure : Figure
    file : Path
        The path whose ending becomes `.png`, `.svg` and `.pdf`.
    dpi : int (default: 150)
        Dots per inch of the PNG, and of images inside the others.
    forms : Sequence[str] (default: "png", "svg", "pdf")
    """
    _take_literally(figure)
    # Of Type 42, whose text can be searched and edited; many journals refuse matplotlib's Type 3.
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "layerfed"}):
        for form in forms:
            with whole(file.with_suffix(f".{form}")) as beside:
                figure.savefig(beside, dpi=dpi, format=form, metadata=UNDATED[form])
    return file.with_suffix(".png")


def legend_name(name: str) -> str:
    """Return a name for a legend, which leaves out those that begin with an underscore."""
    return f"\u200b{name}" if name.startswith("_") else name


def _take_literally(figure: Figure) -> None:
    """Draw names as they are: matplotlib takes what stands between two dollars for mathematics.

    The powers beside a logarithmic axis are such mathematics, and stay so.
    """
    powers = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        if axis.get_scale() != "linear"
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        for label in (tick.label1, tick.label2)
    }
    for text in figure.findobj(Text):
        if text not in powers:
            text.set_parse_math(False)


def fit(axes: Axes, values: Iterable[float], metric: Score) -> None:
    """Make the axis of a score fit its values, within the score's bounds.

    A range below 1e-9 of the values is rounding noise. It is drawn as the constant that it is.
    """
    found = np.asarray([value for value in values if np.isfinite(value)])
    if not len(found):
        return
    low, high, most = found.min(), found.max(), np.abs(found).max()
    room = 0.06 * (high - low) if high - low > 1e-9 * most else 0.1 * most or 0.1
    # A mark on a bound is drawn whole.
    edge = 0.02 * (high - low + 2 * room)
    axes.set_ylim(max(low - room, metric.low - edge), min(high + room, metric.high + edge))


def log_to_zero(axes: Axes, values: Iterable[float], scale: float) -> None:
    """Make an axis logarithmic down to the smallest value above rounding noise, then linear to zero.

    Parameters
    ----------
    axes : Axes
    values : Iterable[float]
        What is drawn, at least 0.
    scale : float
        The size of the numbers that the values were computed from. Values below 1e-9 of it are rounding
        noise, and the axis does not stretch to show their decades.
    """
    noise = NOISE * scale
    above = [value for value in values if value > noise]
    if above:
        axes.set_yscale("symlog", linthresh=min(above), linscale=0.5)
        axes.set_ylim(0, 1.5 * max(above))
    else:
        axes.set_ylim(0, 10 * noise or 1)


def in_percent(axes: Axes, metric: Score) -> None:
    """Write the values of a share in %."""
    if metric.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


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


def draw_run(folder: Path, forms: Sequence[str] = FORMS) -> list[Path]:
    """Draw a run folder's pictures from its files and return the paths of the PNGs.

    The pictures are that of the main score, such as `accuracy.png`, and `layers.png`; `theory.png` if a
    term of `layerfed.server.theory` is known, `data.png` if the clients' data are, and `confusion.png`
    if the final model was evaluated by class. `scores.png` has all scores of a task with more than two.

    Parameters
    ----------
    folder : Path
    forms : Sequence[str] (default: "png", "svg", "pdf")

    Raises
    ------
    OSError, ValueError
        If the folder is no run folder, or one of its files is damaged.
    """
    summary = read_json(folder / "summary.json")
    lines = [folder / "metrics.jsonl", folder / "selection.jsonl"]
    metrics, selections = (read_lines(file) if file.exists() else [] for file in lines)
    title = f"{summary['task']} · {summary['strategy']} · seed {summary['seed']}"
    pictures = {}
    if metrics and selections:  # a run may end before its first round does
        pictures[score_of(summary.get("metric")).name] = _score(metrics, summary, title)
        pictures["layers"] = _layers(selections, title)
    if any(row.get(key) is not None for row in metrics for key in TERMS):
        pictures["theory"] = _theory(metrics, title)
    if metrics and len(curves := score_curves(summary, metrics)) > 2:
        pictures["scores"] = _all_scores(curves, metrics, title)
    data, result = (
        read_json(file) if (file := folder / name).exists() else {}
        for name in ("data.json", "evaluation.json")
    )
    if data.get("clients"):
        pictures["data"] = draw_partition(data)
    if "confusion" in result:
        pictures["confusion"] = _confusion(result, title)
    return [
        save_picture(figure, folder / f"{name}.png", forms=forms)
        for name, figure in pictures.items()
    ]


def _score(metrics: list[dict[str, Any]], summary: dict[str, Any], title: str) -> Figure:
    """Draw the main score by round, and that of each group."""
    metric = score_of(summary.get("metric"))
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    names = dict.fromkeys(name for row in metrics for name in row.get("groups", ()))
    drawn: list[float] = []
    for name in names:
        rows = [row for row in metrics if name in row.get("groups", ())]
        values = [row["groups"][name].get(metric.name) for row in rows]
        rounds = [row["round"] for row in rows]
        axes.plot(rounds, values, linewidth=1, alpha=0.7, label=legend_name(name))
        drawn += [value for value in values if value is not None]
    curve = score_curves(summary, metrics).get(metric.name, ())
    rounds, values = ([point[i] for point in curve] for i in (0, 1))
    axes.plot(rounds, values, color="#1f5fa8", marker="o", markersize=3, linewidth=1.5)
    if curve:
        axes.annotate(
            metric.text(values[-1], digits=1),
            (rounds[-1], values[-1]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            color="#1f5fa8",
        )
    if names:
        axes.legend(fontsize=8)
    axes.set(ylabel=f"test {metric.title}", title=title)
    fit(axes, [*drawn, *values], metric)
    in_percent(axes, metric)
    over_rounds(axes)
    return figure


def _all_scores(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    metrics: list[dict[str, Any]],
    title: str,
) -> Figure:
    """Draw each score by round: on the test set, and as the mean over clients' own examples."""
    across = min(3, len(curves))
    down = -(-len(curves) // across)
    figure = Figure(figsize=(3.6 * across, 2.7 * down), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(down, across, squeeze=False).flat
    for (name, curve), axes in zip(curves.items(), panels, strict=False):
        axes.plot(*zip(*curve, strict=True), color="#1f5fa8", label="test set")
        stated = [(row["round"], row.get(f"client_{name}")) for row in metrics]
        if known := [point for point in stated if point[1] is not None]:
            axes.plot(*zip(*known, strict=True), color="#c05a1a", label="clients")
            axes.legend(fontsize=8)
        axes.set_title(Score(name).title, fontsize=10)
        over_rounds(axes)
    for axes in list(panels):
        axes.set_visible(False)
    return figure


def draw_partition(data: Mapping[str, Any]) -> Figure:
    """Draw the examples of each client, of each class or else of each group, as stacked bars.

    Parameters
    ----------
    data : Mapping[str, Any]
        The content of `data.json`.
    """
    clients = data["clients"]
    names = data["classes"] or data["groups"]
    rows = [
        row["classes"] if data["classes"] else [row["groups"].get(g, 0) for g in names]
        for row in clients
    ]
    table = np.array(rows if names else [[row["examples"]] for row in clients]).T
    figure = Figure(figsize=(max(6.4, 0.12 * len(clients)), 4), layout="constrained")
    axes = figure.subplots()
    colors = matplotlib.colormaps["tab20" if len(table) <= 20 else "turbo"]
    base = np.zeros(table.shape[1])
    for number, counts in enumerate(table):
        color = colors(number if len(table) <= 20 else number / len(table))
        label = legend_name(names[number]) if names else None
        axes.bar(
            [row["partition"] for row in clients], counts, bottom=base, color=color, label=label
        )
        base += counts
    axes.set(xlabel="client", ylabel="training examples")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if 1 < len(names) <= 20:
        figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _confusion(result: Mapping[str, Any], title: str) -> Figure:
    """Draw the share of each true class that was predicted as each class."""
    table, names = np.array(result["confusion"], dtype=float), result["classes"]
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    side = min(max(4.0, 0.28 * len(names) + 1.5), 14)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, format=PercentFormatter(1.0))
    step = -(-len(names) // 40)
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=8)
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=8)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    return figure


def _theory(metrics: list[dict[str, Any]], title: str) -> Figure:
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
    known = [row[key] for key in TERMS for row in metrics if row.get(key)]
    log_to_zero(axes, known, max(known, default=0.0))
    axes.set(ylabel="estimate, in squared gradients", title=title)
    over_rounds(axes)
    axes.legend()
    return figure


def _layers(selections: list[dict[str, Any]], title: str) -> Figure:
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
        found = np.sqrt(norms)
        # Norms of rounding noise have the colour of the smallest one that is none.
        positive = np.maximum(found, np.nanmax(found, initial=0.0) * NOISE or 1.0)
        image = axes[1].imshow(positive.T, cmap="viridis", norm=LogNorm(), **shown)
        figure.colorbar(image, ax=axes[1])
        axes[1].set_title("probed gradient norm (r.m.s. over clients)", fontsize=10)
    for ax in axes:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(xlabel="round")
    return figure
