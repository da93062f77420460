"""The figures of runs, recomputed from their folders, and how a comparison arranges them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from layerfed.report.paper_costs import PaperCosts, paper_costs
from layerfed.runs.files import read_lines

__all__ = ["RunFigures", "Section"]


@dataclass(frozen=True)
class RunFigures:
    """What a completed run came to: sums over its lines, not what its summary says.

    Attributes
    ----------
    folder : Path
    seed : int
    rounds : int
    curve : tuple[tuple[int, float], ...]
        Rounds and test accuracies in [0, 1]; round 0 is the model as it came.
    bytes_up, bytes_down : int
        Over the run, with each client a device of its own.
    bytes_full_up, bytes_full_down : int
        What sending the whole model would have taken.
    flops, flops_probe : float
        Of all clients' training, and of their probes; counted, see `layerfed.task.flops`.
    updates : int
        Updates that the server averaged: clients times rounds, less what failed.
    seconds, train_seconds : float
        Of the rounds, and of their training phases.
    peak_memory : float
        The most bytes a client stated, see `RoundRecord`.
    accounted : PaperCosts
        What the run costs in the paper's accounting.
    """

    folder: Path
    seed: int
    rounds: int
    curve: tuple[tuple[int, float], ...]
    bytes_up: int
    bytes_down: int
    bytes_full_up: int
    bytes_full_down: int
    flops: float
    flops_probe: float
    updates: int
    seconds: float
    train_seconds: float
    peak_memory: float
    accounted: PaperCosts

    @classmethod
    def read(cls, folder: Path) -> RunFigures:
        """Read a run folder.

        Raises
        ------
        OSError, ValueError, KeyError
            If a file of it is missing or damaged.
        """
        summary = _json(folder / "summary.json")
        config = _json(folder / "config.json")
        layers = _json(folder / "layers.json")
        metrics = read_lines(folder / "metrics.jsonl")
        curve = [(row["round"], row["accuracy"]) for row in metrics if row["accuracy"] is not None]
        if summary["initial_accuracy"] is not None:
            curve = [(0, summary["initial_accuracy"]), *curve]

        def total(key: str) -> Any:
            return sum(row[key] for row in metrics)

        return cls(
            folder=folder,
            seed=config["run.seed"],
            rounds=len(metrics),
            curve=tuple(curve),
            bytes_up=total("bytes_up"),
            bytes_down=total("bytes_down"),
            bytes_full_up=total("bytes_full_up"),
            bytes_full_down=total("bytes_full_down"),
            flops=total("flops"),
            flops_probe=total("flops_probe"),
            updates=total("clients"),
            seconds=total("seconds"),
            train_seconds=sum(row["seconds_by_phase"].get("train", 0.0) for row in metrics),
            peak_memory=max((row["peak_memory"] for row in metrics), default=0.0),
            accounted=_accounted(config, layers, read_lines(folder / "selection.jsonl")),
        )

    @property
    def accuracy(self) -> float:
        """Accuracy after the last round that was evaluated; NaN without any."""
        return self.curve[-1][1] if self.curve else float("nan")

    @property
    def best_accuracy(self) -> float:
        """The best of all rounds; NaN without any."""
        return max((accuracy for _, accuracy in self.curve), default=float("nan"))


def _json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _accounted(
    config: Mapping[str, Any], layers: Mapping[str, Any], selections: Sequence[Mapping[str, Any]]
) -> PaperCosts:
    blocks = [layer for layer in layers["layers"] if layer["kind"] == "block"]
    # Nominal, as the paper's: a client with fewer examples than a batch makes smaller steps.
    examples = config["train.local-steps"] * config["train.batch-size"]
    return paper_costs(
        np.concatenate([np.asarray(row["masks"], dtype=bool) for row in selections]),
        layer_flops=np.array([block["forward_flops"] for block in blocks]),
        model_flops=layers["forward_flops"],
        layer_bytes=np.array([block["bytes"] for block in blocks]),
        model_bytes=sum(layer["bytes"] for layer in layers["layers"]),
        examples=examples or None,
    )


@dataclass(frozen=True)
class Section:
    """One experiment of a comparison, arranged for its table and its pictures.

    Attributes
    ----------
    title : str
    rows : Sequence[str]
    budgets : Sequence[str]
        Titles of the columns.
    runs : Mapping[tuple[str, str | None], Sequence[RunFigures]]
        Completed runs of each entry that exists, by row and budget's title; with None for a budget,
        those of a row that keeps to none.
    seeds : int
        How many runs a complete entry has.
    paper : Mapping[str, Sequence[float]]
        Published accuracies in %, by row: one a budget, or one for a row without budgets.
    paper_costs : Mapping[str, Mapping[str, float]]
        Published costs by row and column.
    """

    title: str
    rows: Sequence[str]
    budgets: Sequence[str]
    runs: Mapping[tuple[str, str | None], Sequence[RunFigures]]
    seeds: int
    paper: Mapping[str, Sequence[float]] = field(default_factory=dict)
    paper_costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def within_budget(self, row: str) -> bool:
        """Whether a row keeps to budgets."""
        return (row, None) not in self.runs

    def entry(self, row: str, budget: str) -> Sequence[RunFigures] | None:
        """Return the completed runs of an entry; None where the entry does not exist."""
        return self.runs.get((row, budget if self.within_budget(row) else None))

    def published(self, row: str, budget: str) -> float | None:
        """Return an entry's published accuracy in %, or None."""
        figures = self.paper.get(row)
        if figures is None:
            return None
        found = figures[self.budgets.index(budget) if self.within_budget(row) else 0]
        return None if np.isnan(found) else float(found)

    def first(self, row: str) -> Sequence[RunFigures]:
        """Return a row's runs at the first budget at which it has any."""
        entries = (self.entry(row, budget) for budget in self.budgets)
        return next((entry for entry in entries if entry), ())
