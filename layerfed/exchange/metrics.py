"""The numbers that clients state of their work, each declared once.

A `Metric` says in which phase a client states it, how it is measured, and how the clients' values are
combined. The reply, `RoundRecord.metrics`, `metrics.jsonl`, `clients.jsonl`, the tables and the CSV of a
comparison follow from the declaration. To add one, add it to `METRICS`.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

__all__ = ["METRICS", "Metric", "Numbers", "Work", "metrics_of"]

Phase = Literal["probe", "train", "evaluate"]


@dataclass
class Work:
    """A client's work in one phase, as far as it is measured.

    Attributes
    ----------
    phase : {"probe", "train", "evaluate"}
    device : torch.device
    flops : float
    steps : int
    loss, accuracy : float
    """

    phase: Phase
    device: torch.device
    flops: float = 0.0
    steps: int = 0
    loss: float = math.nan
    accuracy: float = math.nan
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Begin a new peak of memory where a device can; a process elsewhere keeps its own."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def numbers(self, *, private: bool = False) -> dict[str, float]:
        """Return what a client states of the work, by name.

        Parameters
        ----------
        private : bool
            Leave out all numbers that depend on the client's data.
        """
        return {
            metric.name: float(metric.measure(self))
            for metric in metrics_of(self.phase)
            if metric.public or not private
        }


@dataclass(frozen=True)
class Metric:
    """One number that clients state.

    Attributes
    ----------
    name : str
        In the reply and in every file.
    phase : {"probe", "train", "evaluate"}
        With which reply it comes.
    combine : {"sum", "max", "mean"}
        How the values of a round's clients become one. A mean is weighted by their examples.
    measure : Callable[[Work], float]
    least : float
        A reply with a smaller value is refused.
    public : bool
        Whether clients state it even where their replies are private: it must not depend on their data.
    total : bool
        Whether `summary.json` adds it up over rounds.
    """

    name: str
    phase: Phase
    combine: Literal["sum", "max", "mean"]
    measure: Callable[[Work], float]
    least: float = 0.0
    public: bool = False
    total: bool = False


def _peak_memory(work: Work) -> float:
    """Return peak bytes: of tensors in the phase on a GPU, of the process since it started elsewhere."""
    if work.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(work.device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("train_loss", "train", "mean", lambda work: work.loss, least=-math.inf),
        Metric("client_accuracy", "evaluate", "mean", lambda work: work.accuracy),
        Metric("client_loss", "evaluate", "mean", lambda work: work.loss, least=-math.inf),
        Metric("flops", "train", "sum", lambda work: work.flops, public=True, total=True),
        Metric("flops_probe", "probe", "sum", lambda work: work.flops, public=True, total=True),
        Metric("steps", "train", "sum", lambda work: work.steps, least=1.0),
        Metric("train_seconds", "train", "sum", lambda work: time.monotonic() - work.began),
        Metric("peak_memory", "train", "max", _peak_memory),
        Metric("peak_memory_probe", "probe", "max", _peak_memory),
    )
}


def metrics_of(phase: str) -> list[Metric]:
    """Return the metrics that come with one phase's replies."""
    return [metric for metric in METRICS.values() if metric.phase == phase]


class Numbers:
    """What a round's clients stated, by client (partition id)."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self._weights: dict[tuple[int, str], int] = {}

    def add(self, client: int, phase: str, stated: Mapping[str, float], examples: int) -> None:
        """Take in a reply's numbers; those that are not declared are left out.

        Parameters
        ----------
        client : int
        phase : {"probe", "train", "evaluate"}
        stated : Mapping[str, float]
        examples : int
            The weight of the client in a mean.
        """
        row = self.rows.setdefault(client, {})
        for metric in metrics_of(phase):
            if metric.name in stated:
                row[metric.name] = stated[metric.name]
                self._weights[client, metric.name] = examples

    def combined(self) -> dict[str, float | None]:
        """Return each metric over all clients that stated it.

        Where nobody did, a sum or a maximum is 0 and a mean is None. Clients are taken in the order of
        their ids, so that the result does not depend on who answered first.
        """
        return {name: self._combined(metric) for name, metric in METRICS.items()}

    def _combined(self, metric: Metric) -> float | None:
        name = metric.name
        found = {c: row[name] for c, row in sorted(self.rows.items()) if name in row}
        if metric.combine == "sum":
            return sum(found.values(), 0.0)
        if metric.combine == "max":
            return max(found.values(), default=0.0)
        weights = {client: self._weights[client, name] for client in found}
        total = sum(weights.values())
        return sum(weights[c] * x for c, x in found.items()) / total if total else None
