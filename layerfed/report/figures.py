"""The figures of runs, recomputed from their folders, and their arrangement in a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from layerfed.exchange.metrics import METRICS, Metric
from layerfed.report.paper_costs import PaperCosts, paper_costs
from layerfed.runs.files import read_json, read_lines

__all__ = ["TERMS", "RunFigures", "Section"]

TERMS = ("e1", "e2", "e2_masks")
# Figures that are sums over the lines of metrics.jsonl.
TRAFFIC = ("bytes_up", "bytes_down", "bytes_full_up", "bytes_full_down")
SUMS = (*TRAFFIC, "seconds")


@dataclass(frozen=True)
class RunFigures:
    """The figures of a completed run, computed from the lines of its files and not from its summary.

    Attributes
    ----------
    folder : Path
    seed : int
    rounds : int
    curve : tuple[tuple[int, float], ...]
        Rounds and test accuracies in [0, 1]; round 0 is the model before training.
    loss : float
        Test cross-entropy after the last round that was evaluated; NaN without any.
    bytes_up, bytes_down : int
        Bytes of the whole run, as if each client were a separate device.
    bytes_full_up, bytes_full_down : int
        Bytes of the whole run if the full model were sent each time.
    updates : int
        Number of updates that the server averaged: clients times rounds, less failures.
    seconds : float
        Duration of all rounds, by the server's clock.
    metrics : Mapping[str, float]
        What clients stated (`exchange/metrics.py`), combined over rounds as over clients. A mean is that
        of the last round that has one, and NaN without any.
    terms : Mapping[str, tuple[tuple[int, float], ...]]
        E1, E2 and the part of E2 that comes from masks, by their keys in metrics.jsonl: rounds and
        estimates, for rounds that have any (`layerfed.server.theory`).
    engine, device, torch, layerfed : str
        The run's hardware and software; costs of runs that differ in them cannot be compared.
    accounted : PaperCosts
        Costs of the run in the paper's accounting.
    """

    folder: Path
    seed: int
    rounds: int
    curve: tuple[tuple[int, float], ...]
    loss: float
    bytes_up: int
    bytes_down: int
    bytes_full_up: int
    bytes_full_down: int
    updates: int
    seconds: float
    metrics: Mapping[str, float]
    terms: Mapping[str, tuple[tuple[int, float], ...]]
    engine: str
    device: str
    torch: str
    layerfed: str
    accounted: PaperCosts

    @classmethod
    def read(cls, folder: Path) -> RunFigures:
        """Read a run folder.

        Raises
        ------
        OSError, ValueError, KeyError
            If one of its files is missing or damaged.
        """
        summary, config, layers = (
            read_json(folder / f"{name}.json") for name in ("summary", "config", "layers")
        )
        metrics = read_lines(folder / "metrics.jsonl")
        if len(metrics) != summary["rounds"]:
            raise ValueError(
                f"metrics.jsonl has {len(metrics)} whole lines for {summary['rounds']} rounds"
            )
        curve = [(row["round"], row["accuracy"]) for row in metrics if row["accuracy"] is not None]
        if summary["initial_accuracy"] is not None:
            curve = [(0, summary["initial_accuracy"]), *curve]

        return cls(
            folder=folder,
            seed=config["run.seed"],
            rounds=len(metrics),
            curve=tuple(curve),
            loss=next(
                (row["loss"] for row in reversed(metrics) if row["loss"] is not None), math.nan
            ),
            updates=sum(row["clients"] for row in metrics),
            **{key: sum(row[key] for row in metrics) for key in SUMS},
            metrics={metric.name: _over_rounds(metric, metrics) for metric in METRICS.values()},
            terms={
                key: tuple((row["round"], row[key]) for row in metrics if row.get(key) is not None)
                for key in TERMS
            },
            engine=summary["engine"],
            device=config["run.device"],
            torch=summary["versions"]["torch"],
            layerfed=summary["versions"]["layerfed"],
            accounted=_accounted(config, layers, read_lines(folder / "selection.jsonl")),
        )

    @property
    def accuracy(self) -> float:
        """Accuracy after the last round that was evaluated; NaN without any."""
        return self.curve[-1][1] if self.curve else float("nan")

    @property
    def e1(self) -> float:
        """Mean of E1's estimates over rounds; NaN without any."""
        return self._term("e1")

    @property
    def e2(self) -> float:
        """Mean of E2's estimates over rounds; NaN without any."""
        return self._term("e2")

    @property
    def e2_masks(self) -> float:
        """Mean over rounds of the part of E2 that comes from masks; NaN without any."""
        return self._term("e2_masks")

    def _term(self, key: str) -> float:
        values = [value for _, value in self.terms[key]]
        return sum(values) / len(values) if values else float("nan")

    @property
    def best_accuracy(self) -> float:
        """The best accuracy of all rounds; NaN without any."""
        return max((accuracy for _, accuracy in self.curve), default=float("nan"))


def _over_rounds(metric: Metric, rounds: Sequence[Mapping[str, Any]]) -> float:
    # Runs of earlier versions lack some keys.
    values = [row[metric.name] for row in rounds if row.get(metric.name) is not None]
    if metric.combine == "sum":
        return float(sum(values))
    return max(values, default=0.0) if metric.combine == "max" else (values or [math.nan])[-1]


def _accounted(
    config: Mapping[str, Any], layers: Mapping[str, Any], selections: Sequence[Mapping[str, Any]]
) -> PaperCosts:
    blocks = [layer for layer in layers["layers"] if layer["kind"] == "block"]
    # A nominal number, as in the paper: a client with fewer examples than a batch makes smaller steps.
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
        Completed runs of each entry that exists, by row and budget's title. The budget is None for a row
        without budgets.
    seeds : int
        Number of runs of a complete entry.
    paper : Mapping[str, Sequence[float]]
        Published accuracies in %, by row: one for each budget, or one for a row without budgets.
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
        """Return whether a row has budgets."""
        return (row, None) not in self.runs

    def entry(self, row: str, budget: str) -> Sequence[RunFigures] | None:
        """Return the completed runs of an entry, or None if the entry does not exist."""
        return self.runs.get((row, budget if self.within_budget(row) else None))

    def published(self, row: str, budget: str) -> float | None:
        """Return an entry's published accuracy in %, or None."""
        figures = self.paper.get(row)
        if figures is None:
            return None
        found = figures[self.budgets.index(budget) if self.within_budget(row) else 0]
        return None if np.isnan(found) else float(found)

    def first(self, row: str) -> Sequence[RunFigures]:
        """Return a row's runs at the first budget for which it has any."""
        entries = (self.entry(row, budget) for budget in self.budgets)
        return next((entry for entry in entries if entry), ())
