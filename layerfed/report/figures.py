"""The figures of runs, recomputed from their folders, and their arrangement in a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from layerfed.exchange.metrics import METRICS, Metric, client_metrics
from layerfed.exchange.scores import ACCURACY, LOSS, Score, score_of
from layerfed.report.paper_costs import PaperCosts, paper_costs
from layerfed.runs.files import read_json, read_lines

__all__ = ["TERMS", "RunFigures", "Section", "score_curves", "scores_in", "spent_by_round"]

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
    metric : Score
        The main score.
    curves : Mapping[str, tuple[tuple[int, float], ...]]
        Rounds and values of each score on the test set; round 0 is the model before training.
    evaluated : int
        The last round that was evaluated, 0 without any. A score may be undefined there.
    bytes_up, bytes_down : int
        Bytes of the whole run, as if each client were a separate device.
    bytes_full_up, bytes_full_down : int
        Bytes of the whole run if the full model were sent each time.
    updates : int
        Number of updates that the server averaged: clients times rounds, less failures.
    seconds : float
        Duration of all rounds, by the server's clock.
    spent : Mapping[str, Sequence[float]]
        What was spent up to each round, from round 0 (`spent_by_round`).
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
    metric: Score
    curves: Mapping[str, tuple[tuple[int, float], ...]]
    evaluated: int
    bytes_up: int
    bytes_down: int
    bytes_full_up: int
    bytes_full_down: int
    updates: int
    seconds: float
    spent: Mapping[str, Sequence[float]]
    metrics: Mapping[str, float]
    terms: Mapping[str, tuple[tuple[int, float], ...]]
    engine: str
    device: str
    torch: str
    layerfed: str
    data: str
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
        return cls(
            folder=folder,
            seed=config["run.seed"],
            rounds=len(metrics),
            metric=score_of(summary.get("metric")),
            curves=score_curves(summary, metrics),
            evaluated=max((row["round"] for row in metrics if _is_evaluated(row)), default=0),
            updates=sum(row["clients"] for row in metrics),
            **{key: sum(row[key] for row in metrics) for key in SUMS},
            spent=spent_by_round(metrics),
            metrics={metric.name: _over_rounds(metric, metrics) for metric in _stated(metrics)},
            terms={
                key: tuple((row["round"], row[key]) for row in metrics if row.get(key) is not None)
                for key in TERMS
            },
            engine=summary["engine"],
            device=config["run.device"],
            torch=summary["versions"]["torch"],
            layerfed=summary["versions"]["layerfed"],
            data=summary.get("data") or "",
            accounted=_accounted(config, layers, read_lines(folder / "selection.jsonl")),
        )

    @property
    def curve(self) -> tuple[tuple[int, float], ...]:
        """Rounds and values of the main score."""
        return self.curves.get(self.metric.name, ())

    def final(self, name: str) -> float:
        """Return a score after the last round that was evaluated; NaN if it is undefined there."""
        return dict(self.curves.get(name, ())).get(self.evaluated, math.nan)

    @property
    def value(self) -> float:
        """The main score after the last round that was evaluated; NaN if it is undefined there."""
        return self.final(self.metric.name)

    @property
    def accuracy(self) -> float:
        """Accuracy after the last round that was evaluated; NaN without any."""
        return self.final(ACCURACY.name)

    @property
    def loss(self) -> float:
        """Test loss after the last round that was evaluated; NaN without any."""
        return self.final(LOSS.name)

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
        """The best accuracy of all rounds, without that before training; NaN without any."""
        values = (accuracy for number, accuracy in self.curves.get(ACCURACY.name, ()) if number)
        return max(values, default=math.nan)

    @property
    def best_value(self) -> float:
        """The best main score of all rounds, without that before training; NaN without any."""
        best = self.metric.best(value for number, value in self.curve if number)
        return math.nan if best is None else best


def spent_by_round(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return what was spent up to each round, from round 0: bytes of both directions, FLOPs, seconds.

    The seconds of simulated clients are those of their own clocks.
    """
    simulated = ("simulated_seconds", "simulated_seconds_probe")
    each = {
        "bytes": [line["bytes_up"] + line["bytes_down"] for line in lines],
        "flops": [line.get("flops", 0) + line.get("flops_probe", 0) for line in lines],
        "seconds": [
            sum(line.get(key, 0) for key in simulated) or line["seconds"] for line in lines
        ],
    }
    return {key: [0, *np.cumsum(values).tolist()] for key, values in each.items()}


def scores_in(line: Mapping[str, Any]) -> Mapping[str, float | None]:
    """Return all scores of a line of `metrics.jsonl`; runs of earlier versions have two."""
    two = {score.name: line.get(score.name) for score in (ACCURACY, LOSS)}
    found: Mapping[str, float | None] = line.get("scores", two)
    return found


def _is_evaluated(line: Mapping[str, Any]) -> bool:
    """Return whether the model was evaluated in a round; an undefined score is None in its line."""
    return bool(line.get("scores")) or any(v is not None for v in scores_in(line).values())


def score_curves(
    summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[tuple[int, float], ...]]:
    """Return the rounds and values of each score of a run; round 0 is the model before training.

    Parameters
    ----------
    summary : Mapping[str, Any]
        The content of `summary.json`.
    lines : Sequence[Mapping[str, Any]]
        Those of `metrics.jsonl`.
    """
    before = summary.get("initial_scores") or {ACCURACY.name: summary["initial_accuracy"]}
    rows = [(0, before), *((line["round"], scores_in(line)) for line in lines)]
    names = dict.fromkeys(name for _, scores in rows for name in scores)
    curves = {
        name: tuple((r, v) for r, scores in rows if (v := scores.get(name)) is not None)
        for name in names
    }
    return {name: curve for name, curve in curves.items() if curve}


def _stated(lines: Sequence[Mapping[str, Any]]) -> list[Metric]:
    """Return the metrics that clients of a run stated, those of the task's own scores last."""
    scores = dict.fromkeys(name for line in lines for name in line.get("scores", ()))
    return list({**METRICS, **client_metrics(map(Score, scores))}.values())


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

    @property
    def metric(self) -> Score:
        """The main score of its runs."""
        return next((run.metric for runs in self.runs.values() for run in runs), ACCURACY)

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
