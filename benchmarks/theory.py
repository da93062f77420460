"""Whether E1 + E2 of a round order the strategies of a comparison by their later losses.

    layerfed compare conf/scanners.toml --strategies … --dir runs/scanners strategy.theory=true
    python -m benchmarks.theory runs/scanners --figure theory.png

For each seed, round t and lead k: Spearman's rank correlation, over the runs of this seed, between the
terms of round t and the test loss after round t + k. Printed is the mean over rounds and seeds, with its
standard error over seeds' means. +1 says that the theory orders the strategies as their losses do. Runs
that share no step size or number of clients should not be compared, nor rounds without E1 (runs without
`strategy.theory`).
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from layerfed.runs import read_lines

TERMS = ("E1", "E2", "E1 + E2", "masks' E2", "E1 + masks' E2", "loss")
Rounds = dict[int, dict[str, Any]]


def terms_of(line: dict[str, Any]) -> dict[str, float]:
    """Return the terms of one round; those that the run did not estimate are left out."""
    e1, e2, masks = (line[key] for key in ("e1", "e2", "e2_masks"))
    found = {"E1": e1, "E2": e2, "masks' E2": masks, "loss": line["loss"]}
    if e1 is not None:
        found |= {"E1 + E2": e1 + e2} if e2 is not None else {}
        found |= {"E1 + masks' E2": e1 + masks} if masks is not None else {}
    return {name: value for name, value in found.items() if value is not None}


def ordered(runs: list[Rounds], lead: int) -> dict[str, float]:
    """Return the mean rank correlation over rounds t between each term and the loss at t + lead."""
    found = defaultdict(list)
    for number in sorted(set.intersection(*(set(run) for run in runs))):
        later = [run.get(number + lead, {}).get("loss") for run in runs]
        terms = [terms_of(run[number]) for run in runs]
        if None in later:
            continue
        for name in TERMS:
            values = [each[name] for each in terms if name in each]
            if len(values) == len(runs) and len({*values}) > 1:
                found[name].append(float(spearmanr(values, later).statistic))
    return {name: float(np.mean(values)) for name, values in found.items()}


def main(
    folder: Annotated[
        Path, typer.Argument(help="a comparison's folder, or one of its experiments")
    ],
    leads: Annotated[
        str, typer.Option(help="numbers of rounds k, separated by commas")
    ] = "1,2,5,10",
    only: Annotated[str, typer.Option(help="rows, by the beginning of folders' names")] = "",
    figure: Annotated[Path | None, typer.Option("--figure")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
) -> None:
    """Read the runs, print the correlations, and draw them."""
    by_seed: dict[int, list[Rounds]] = defaultdict(list)
    rows: list[str] = []
    for file in sorted(folder.glob("*/metrics.jsonl")):
        if only and not file.parent.name.startswith(tuple(only.split(","))):
            continue
        config = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
        summary = json.loads((file.parent / "summary.json").read_text(encoding="utf-8"))
        if summary["status"] != "completed":
            typer.echo(f"{file.parent.name}: {summary['status']}, so it is left out")
            continue
        rounds = {line["round"]: line for line in read_lines(file) if line["round"]}
        if not any(line["e1"] is not None for line in rounds.values()):
            typer.echo(f"{file.parent.name}: no E1, so it is left out (strategy.theory=true)")
            continue
        by_seed[config["run.seed"]].append(rounds)
        rows.append(file.parent.name)
    if not rows or min(map(len, by_seed.values())) < 3:
        raise typer.BadParameter(
            f"{folder} has {len(rows)} runs with E1; a seed needs three or more"
        )
    counts = [int(lead) for lead in leads.split(",")]
    found: dict[str, list[list[float]]] = {name: [] for name in TERMS}
    for lead in counts:
        seeds = [ordered(runs, lead) for runs in by_seed.values()]
        for name in TERMS:
            found[name].append([seed[name] for seed in seeds if name in seed])
    table = Table("orders the loss after", *(f"{lead} rounds" for lead in counts))
    for name, columns in found.items():
        cells = [f"{np.mean(c):+.2f} ± {_error(c):.2f}" if c else "–" for c in columns]
        table.add_row(name, *cells)
    Console().print(f"{len(rows)} runs: {', '.join(rows)}")
    Console().print(table)
    if json_file:
        json_file.write_text(json.dumps({"leads": counts, **found}, indent=2) + "\n", "utf-8")
    if figure:
        _draw(counts, found, figure)


def _error(values: list[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def _draw(leads: list[int], found: dict[str, list[list[float]]], file: Path) -> None:
    drawing, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    shown: list[list[list[float]]] = []
    for name, columns in found.items():
        if all(columns) and columns not in shown:  # two terms are equal if all clients take part
            shown.append(columns)
            heights, errors = [np.mean(c) for c in columns], [_error(c) for c in columns]
            axis.errorbar(leads, heights, errors, marker="o", capsize=3, label=name)
    axis.axhline(0, color="0.3", lw=0.8)
    axis.set_ylim(-1.05, 1.05)
    axis.set_xlabel("rounds between the terms and the loss, k")
    axis.set_ylabel("rank correlation over strategies")
    axis.legend(loc="lower right", ncols=2, fontsize="small")
    drawing.savefig(file, dpi=110)


if __name__ == "__main__":
    typer.run(main)
