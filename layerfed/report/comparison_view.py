"""What the page of several runs shows, as plain data from the files of the run folders only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from layerfed.config import ConfigError, RunConfig, StrategyConfig
from layerfed.report.comparison import TESTS, differences
from layerfed.report.comparison_plots import mean_curve, pareto_front
from layerfed.report.figures import RunFigures, Section
from layerfed.report.run_view import metric_of
from layerfed.report.significance import differences_by_seed, holm, paired_test
from layerfed.runs.files import read_json

__all__ = ["comparison_view", "run_folders", "sections_of"]

NOT_GIVEN = "–"
COSTS = ("bytes_up", "flops", "seconds")
# What makes runs comparable in one picture, and what names an entry by itself.
EXPERIMENT = ("task.name", "task.data", "model.name")
BUDGET = ("budget.kind", "budget.unit", "budget.layers", "budget.min", "budget.max")
# Settings in which the runs of one entry may differ.
SHARED = {f"strategy.{name.replace('_', '-')}" for name in StrategyConfig.model_fields}
FREE = ("run.", "federation.timeout", "strategy.options", "strategy.name")


def run_folders(place: Path, depth: int = 3) -> list[Path]:
    """Return the run folders at or below a place, by name.

    Links are not followed, so nothing outside of the place is found. A folder that cannot be read may
    be one, and reading it tells why it cannot.
    """
    try:
        if (place / "summary.json").is_file():
            return [place]
        if not depth or not place.is_dir():
            return []
        inner = sorted(p for p in place.iterdir() if p.is_dir() and not p.is_symlink())
    except PermissionError:
        return [place]
    return [found for folder in inner for found in run_folders(folder, depth - 1)]


def sections_of(folders: Iterable[Path]) -> tuple[list[Section], list[tuple[str, str]]]:
    """Arrange any completed runs by experiment, by entry (what their settings differ in) and by seed.

    Returns
    -------
    tuple[list[Section], list[tuple[str, str]]]
        The sections, and folders that were left out, each with the reason.

    Raises
    ------
    ConfigError
        If no folder holds a completed run.
    """
    runs: list[tuple[RunFigures, dict[str, Any]]] = []
    left_out = []
    for folder in folders:
        try:
            status = read_json(folder / "summary.json").get("status")
            if status != "completed":
                raise ValueError(f"its status is '{status}'")
            runs.append((RunFigures.read(folder), read_json(folder / "config.json")))
        except (OSError, ValueError, KeyError) as error:
            left_out.append((str(folder), f"{error}" or type(error).__name__))
    if not runs:
        reasons = "".join(f"; {name}: {reason}" for name, reason in left_out)
        raise ConfigError(f"there is no completed run to compare{reasons}")
    experiments: dict[tuple[Any, ...], list[tuple[RunFigures, dict[str, Any]]]] = {}
    for run, config in runs:
        metric = metric_of(read_json(run.folder / "summary.json"))["name"]
        same = (*(config.get(key) for key in EXPERIMENT), metric)
        experiments.setdefault(same, []).append((run, config))
    return [_section(found) for found in experiments.values()], left_out


def _section(runs: Sequence[tuple[RunFigures, Mapping[str, Any]]]) -> Section:
    defaults = RunConfig().to_flat()
    # A setting that a folder lacks is younger than it, but a strategy's own is that of another strategy.
    common = [key for key in defaults if not key.startswith("strategy.") or key in SHARED]
    runs = [(run, {**{key: defaults[key] for key in common}, **config}) for run, config in runs]
    configs = [config for _, config in runs]

    def differ(key: str, strategy: str = "") -> bool:
        those = [c for c in configs if strategy in ("", c["strategy.name"])]
        # One of a user's own task or strategy stands in a configuration only where it was given.
        given = key.startswith("task.") or ":" in strategy
        return len({str(c.get(key, NOT_GIVEN)) for c in those if given or key in c}) > 1

    keys = dict.fromkeys(key for config in configs for key in config if not key.startswith(FREE))
    own = [key for key in keys if key.startswith("strategy.") and key not in SHARED]
    strategies = {str(config["strategy.name"]) for config in configs}
    varied_by = {
        strategy: [key for key in keys if differ(key, strategy if key in own else "")]
        for strategy in strategies
    }
    varied = [key for key in keys if any(key in found for found in varied_by.values())]
    # Without its section, which leaves charts no room, unless two settings would be called the same.
    ends = [key.rpartition(".")[2] for key in varied]
    short = {
        key: key if ends.count(end) > 1 else end for key, end in zip(varied, ends, strict=True)
    }
    entries: dict[tuple[str, str | None], list[RunFigures]] = {}
    for run, config in runs:
        row = " · ".join(
            [
                str(config["strategy.name"]),
                *(
                    f"{short[key]} = {config.get(key, NOT_GIVEN)}"
                    for key in varied_by[str(config["strategy.name"])]
                    if key not in ("budget.kind", "budget.layers")
                ),
            ]
        )
        kind = config["budget.kind"]
        budget = f"R = {config['budget.layers']:g}" if kind == "identical" else str(kind)
        same = any(key in BUDGET for key in varied)
        entries.setdefault((row, budget if same else None), []).append(run)
    return Section(
        title=" · ".join(str(configs[0].get(key)) for key in EXPERIMENT if configs[0].get(key)),
        rows=list(dict.fromkeys(row for row, _ in entries)),
        budgets=list(dict.fromkeys(budget for _, budget in entries if budget)),
        runs=entries,
        seeds=len({run.seed for run, _ in runs}),
    )


def comparison_view(
    title: str,
    sections: Sequence[Section],
    left_out: Sequence[tuple[str, str]] = (),
    reference: str = "ilp",
) -> dict[str, Any]:
    """Return the page's data for runs that are arranged by experiment, entry and seed.

    The page opens with the differences to the first entry whose name begins with `reference`.
    """
    shown = [section for section in sections if any(section.runs.values())]
    runs = [run for section in shown for found in section.runs.values() for run in found]
    seeds = sorted({run.seed for run in runs})
    entries = sum(bool(found) for section in shown for found in section.runs.values())
    return {
        "kind": "comparison",
        "title": title,
        "reference": reference,
        "sentence": f"{len(runs)} runs: {entries} entries in {len(shown)} "
        f"{'experiment' if len(shown) == 1 else 'experiments'}, seeds {', '.join(map(str, seeds))}. "
        "The best mean need not be better than the others: look at the differences paired by seed.",
        "warning": differences(shown).replace("**", ""),
        "experiments": [_experiment(section) for section in shown],
        "tests_about": TESTS,
        "settings": _varied([read_json(run.folder / "config.json") for run in runs]),
        "left_out": list(left_out),
    }


def _experiment(section: Section) -> dict[str, Any]:
    first = next(run for found in section.runs.values() for run in found)
    metric = metric_of(read_json(first.folder / "summary.json"))
    named = {
        f"{row} · {budget}" if budget else row: found
        for (row, budget), found in section.runs.items()
        if found
    }
    entries: list[dict[str, Any]] = [
        {
            "name": name,
            **_curve(found),
            "runs": [_run(run) for run in found],
        }
        for name, found in named.items()
    ]
    sign = 1 if metric["higher_is_better"] else -1

    def front(cost: str) -> list[tuple[float, float]]:
        means = [
            [float(np.mean([run[key] for run in entry["runs"]])) for key in (cost, "score")]
            for entry in entries
        ]
        points = [(spent, sign * score) for spent, score in means]
        return [(spent, sign * score) for spent, score in pareto_front(points)]

    return {
        "title": section.title,
        "metric": metric,
        "entries": entries,
        "fronts": {cost: front(cost) for cost in COSTS},
        "tests": {name: _tests(named, name) for name in named},
    }


def _tests(entries: Mapping[str, Sequence[RunFigures]], reference: str) -> dict[str, Any]:
    """Return the paired tests of each entry against one, for entries with two pairs or more."""
    found = {
        name: differences
        for name, runs in entries.items()
        if name != reference
        and len(differences := differences_by_seed(runs, entries[reference])) > 1
    }
    tests = holm([paired_test(each) for each in found.values()])
    return {name: asdict(test) for name, test in zip(found, tests, strict=True)}


def _curve(runs: Sequence[RunFigures]) -> dict[str, Any]:
    """Return the main score by round, mean with its band, and the mean of what was spent by then."""
    if not all(run.curve for run in runs):
        return {"curve": [], "spent": {}}
    rounds, mean, spread = mean_curve([run.curve for run in runs])
    rows = np.stack([rounds, mean, mean - spread, mean + spread]).T
    spent = {
        key: np.mean([[run.spent[key][number] for number in rounds] for run in runs], axis=0)
        for key in runs[0].spent
    }
    return {
        "curve": (rows if len(runs) > 1 else rows[:, :2]).tolist(),
        "spent": {key: values.tolist() for key, values in spent.items()},
    }


def _run(run: RunFigures) -> dict[str, Any]:
    return {
        "folder": run.folder.name,
        "seed": run.seed,
        "score": run.value,
        "best": run.best_value,
        "loss": run.loss,
        "bytes_up": run.bytes_up,
        "bytes_down": run.bytes_down,
        "share_up": run.bytes_up / run.bytes_full_up if run.bytes_full_up else None,
        "flops": run.metrics["flops"] + run.metrics["flops_probe"],
        "seconds": run.spent["seconds"][-1],
        "engine": run.engine,
        "device": run.device,
    }


def _varied(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the settings with more than one value, each with its values."""
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: sorted({str(config.get(key, "–")) for config in configs}) for key in keys}
    return [
        (key, found)
        for key, found in values.items()
        if len(found) > 1 and not key.startswith(("run.name", "run.dir", "run.resume"))
    ]
