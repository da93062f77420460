"""A grid of runs, strategies by budgets by seeds, and the table that compares them.

What is done already is not run again, so an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerfed.config import ConfigError, RunConfig
from layerfed.strategies import STRATEGIES

__all__ = ["Cell", "cells", "finished", "write_tables"]

METRICS = ("accuracy", "bytes_up", "bytes_down", "flops", "flops_probe", "seconds")


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    strategy: str
    budget: str
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return f"{self.strategy}-R{self.budget}-seed{self.seed}"


def cells(
    base: RunConfig,
    strategies: Sequence[str],
    budgets: Sequence[str],
    seeds: Sequence[int],
    directory: Path,
) -> list[Cell]:
    """Return the runs of a grid, leaving out combinations that do not exist.

    A strategy that keeps to no budget (`full`, `fedtlu`) is run once a seed; `both` is undefined where
    every client has one layer.

    Parameters
    ----------
    base : RunConfig
        Everything that the grid does not vary.
    strategies : Sequence[str]
    budgets : Sequence[str]
        Numbers (the same for every client, in the configuration's unit) or `half-normal`.
    seeds : Sequence[int]
    directory : Path
        Where the run folders go.

    Raises
    ------
    ConfigError
        If a strategy or budget is unknown.
    """
    grid = []
    for seed in seeds:
        for strategy in strategies:
            for budget in budgets if _has_budget(strategy) else ["-"]:
                flat = base.to_flat() | {
                    "strategy.name": strategy,
                    "run.seed": seed,
                    "run.dir": str(directory),
                    "run.name": f"{strategy}-R{budget}-seed{seed}",
                    **_budget(budget),
                }
                if strategy == "both" and _room_for_one(flat):
                    continue
                grid.append(Cell(strategy, budget, seed, RunConfig.from_flat(flat)))
    return grid


def _has_budget(strategy: str) -> bool:
    # A name that is no strategy is refused with the configuration.
    return strategy not in STRATEGIES or STRATEGIES[strategy].within_budget


def _room_for_one(flat: dict[str, Any]) -> bool:
    identical = flat["budget.kind"] == "identical" and flat["budget.unit"] == "layers"
    return identical and float(flat["budget.layers"]) < 2


def _budget(budget: str) -> dict[str, Any]:
    if budget == "-":
        return {}
    if budget == "half-normal":
        return {"budget.kind": "half-normal"}
    try:
        return {"budget.kind": "identical", "budget.layers": float(budget)}
    except ValueError:
        raise ConfigError(f"budget '{budget}' is neither a number nor half-normal") from None


def finished(cell: Cell, directory: Path) -> dict[str, Any] | None:
    """Return the summary of a cell that ran to its end with this very configuration.

    Raises
    ------
    ConfigError
        If the folder holds a run of another configuration.
    """
    folder = directory / cell.name
    if not (folder / "config.json").exists():
        return None
    theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if theirs != cell.config.to_flat():
        changed = [k for k, v in cell.config.to_flat().items() if theirs.get(k) != v]
        raise ConfigError(
            f"{folder} holds a run of another configuration ({', '.join(changed)} differ); compare "
            "into another --dir, or remove that folder"
        )
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary if summary["status"] == "completed" else None


def write_tables(rows: Iterable[tuple[Cell, dict[str, Any]]], directory: Path) -> Path:
    """Write `runs.csv`, a line a run, and `table.md`, mean ± standard deviation over seeds.

    The best accuracy of each budget is set in bold. Strategies without one stand outside, as `full`
    does in the paper's tables. Returns the path of `table.md`.
    """
    found = list(rows)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell, summary in found:
        groups.setdefault((cell.strategy, cell.budget), []).append(summary)
    budgets = list(dict.fromkeys(b for _, b in groups if b != "-"))
    strategies = list(dict.fromkeys(s for s, _ in groups))
    best = {
        budget: max(
            (_mean(groups[s, budget], "accuracy") for s in strategies if (s, budget) in groups),
            default=0.0,
        )
        for budget in budgets
    }

    def row(strategy: str) -> list[str]:
        texts = []
        for budget in budgets:
            key = (strategy, budget if _has_budget(strategy) else "-")
            texts.append(_cell(groups.get(key), best[budget] if key[1] != "-" else None))
        first = next(g for (s, _), g in groups.items() if s == strategy)
        return [
            strategy,
            *texts,
            f"{100 * _mean(first, 'bytes_up') / _mean(first, 'bytes_full_up'):.1f}",
            f"{100 * _mean(first, 'bytes_down') / _mean(first, 'bytes_full_down'):.1f}",
            f"{(_mean(first, 'flops') + _mean(first, 'flops_probe')) / 1e12:.2f}",
        ]

    header = [
        "strategy",
        *(f"R = {budget}" for budget in budgets),
        "uplink %",
        "downlink %",
        "TFLOPs",
    ]
    seeds = len({cell.seed for cell, _ in found})
    lines = [
        f"Final test accuracy in %, mean ± standard deviation over {seeds} seeds. Bytes (in % of "
        "full-model exchange) and TFLOPs (probe included) at the first budget a strategy has.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row(strategy)) + " |" for strategy in strategies),
        "",
    ]
    _replace(directory / "table.md", "\n".join(lines))
    with (directory / "runs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["strategy", "budget", "seed", *METRICS])
        for cell, summary in found:
            writer.writerow(
                [cell.strategy, cell.budget, cell.seed, *(summary[name] for name in METRICS)]
            )
    return directory / "table.md"


def _mean(group: Sequence[dict[str, Any]], metric: str) -> float:
    return statistics.fmean(summary[metric] for summary in group)


def _cell(group: Sequence[dict[str, Any]] | None, best: float | None) -> str:
    if group is None:
        return "–"
    scores = [100 * summary["accuracy"] for summary in group]
    mean = statistics.fmean(scores)
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    text = f"{mean:.2f}{spread}"
    return f"**{text}**" if best is not None and mean >= 100 * best - 1e-9 else text


def _replace(file: Path, text: str) -> None:
    beside = file.with_name(file.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


def run_missing(
    grid: Sequence[Cell],
    directory: Path,
    run: Callable[[Cell], None],
) -> list[tuple[Cell, dict[str, Any]]]:
    """Run what is not finished, drawing the table anew after each run; return every summary."""
    directory.mkdir(parents=True, exist_ok=True)
    done: dict[Cell, dict[str, Any]] = {}
    for cell in grid:
        summary = finished(cell, directory)
        if summary is not None:
            done[cell] = summary
    for cell in grid:
        if cell in done:
            continue
        _set_aside(directory / cell.name)
        run(cell)
        summary = finished(cell, directory)
        if summary is not None:
            done[cell] = summary
        write_tables([(c, done[c]) for c in grid if c in done], directory)
    return [(cell, done[cell]) for cell in grid if cell in done]


def _set_aside(folder: Path) -> None:
    """Move what an interrupted run left out of the way; nothing a run wrote is deleted."""
    if folder.exists():
        count = 1
        while (aside := folder.with_name(f"{folder.name}.interrupted-{count}")).exists():
            count += 1
        folder.rename(aside)
