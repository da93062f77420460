"""The metrics: numbers that clients state about their work, each declared once.

A `Metric` declares the phase in which a client states it, how it is measured, and how the clients'
values are combined. The reply, `RoundRecord.metrics`, `metrics.jsonl`, `clients.jsonl`, the tables and
the CSV of a comparison follow from the declaration. To add a metric, add it to `METRICS`. The scores of
a task on clients' own examples are metrics too, `client_NAME` (`client_metrics`).
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from layerfed.exchange.scores import ACCURACY, LOSS, Score

__all__ = ["METRICS", "Metric", "Numbers", "Work", "client_metrics", "metrics_of"]

Phase = Literal["probe", "train", "evaluate"]


@dataclass
class Work:
    """The measurements of a client's work in one phase.

    Attributes
    ----------
    phase : {"probe", "train", "evaluate"}
    device : torch.device
    flops : float
    steps : int
    loss : float
    memory : Mapping[str, float]
        Bytes of a step's weights, activations, gradients and optimiser, each at its peak.
    prefix_hits : float
        The share of examples whose outputs of frozen blocks were kept (`train.prefix-cache`).
    flops_saved : float
        The FLOPs that these outputs would have taken.
    speed : float
        FLOPs a second of a simulated client; 0 if it is not simulated.
    """

    phase: Phase
    device: torch.device
    flops: float = 0.0
    steps: int = 0
    loss: float = math.nan
    memory: Mapping[str, float] = field(default_factory=dict)
    prefix_hits: float = 0.0
    flops_saved: float = 0.0
    speed: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Reset the peak of GPU memory. On a CPU the peak is that of the process since its start."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def numbers(self, *, private: bool) -> dict[str, float]:
        """Return the metrics that a client states about the work, by name.

        Parameters
        ----------
        private : bool
            Whether to leave out all metrics that depend on the client's data.
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
        Its name in the reply and in every file.
    phase : {"probe", "train", "evaluate"}
        The phase whose replies state it.
    combine : {"sum", "max", "mean"}
        The rule that combines the values of a round's clients. A mean is weighted by their examples.
    measure : Callable[[Work], float]
    least : float
        The smallest allowed value; a reply with a smaller one is refused.
    most : float
        A reply with a larger value is refused.
    required : bool
        Whether a reply without it is refused.
    public : bool
        Whether clients state it even if their replies are private.
    total : bool
        Whether `summary.json` has its sum over rounds.
    """

    name: str
    phase: Phase
    combine: Literal["sum", "max", "mean"]
    measure: Callable[[Work], float]
    least: float = 0.0
    most: float = math.inf
    required: bool = False
    public: bool = False
    total: bool = False


def _peak_memory(work: Work) -> float:
    """Return peak bytes: of tensors in the phase on a GPU, or of the whole process on a CPU."""
    if work.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(work.device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _simulated(work: Work) -> float:
    """Return a simulated client's seconds, or 0."""
    return work.flops / work.speed if work.speed else 0.0


def _memory(part: str, work: Work) -> float:
    """Return the bytes of one part of a step's memory, at its own peak."""
    return work.memory.get(part, 0.0)


def _of_score(score: Score) -> Metric:
    """Return the metric that a score is on clients' own examples; `task/scoring.py` measures it."""
    return Metric(
        f"client_{score.name}",
        "evaluate",
        "mean",
        lambda work: math.nan,
        least=score.low,
        most=score.high,
        required=score in (ACCURACY, LOSS),
    )


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("train_loss", "train", "mean", lambda work: work.loss, least=-math.inf),
        _of_score(ACCURACY),
        _of_score(LOSS),
        Metric("flops", "train", "sum", lambda work: work.flops, public=True, total=True),
        Metric("flops_probe", "probe", "sum", lambda work: work.flops, public=True, total=True),
        Metric("flops_saved", "train", "sum", lambda work: work.flops_saved, total=True),
        Metric("prefix_hits", "train", "mean", lambda work: work.prefix_hits, most=1.0),
        Metric("steps", "train", "sum", lambda work: work.steps, least=1.0),
        Metric("simulated_seconds", "train", "max", _simulated, public=True, total=True),
        Metric("simulated_seconds_probe", "probe", "max", _simulated, public=True, total=True),
        Metric("train_seconds", "train", "sum", lambda work: time.monotonic() - work.began),
        Metric("peak_memory", "train", "max", _peak_memory),
        Metric("peak_memory_probe", "probe", "max", _peak_memory),
        *(
            Metric(f"memory_{part}", "train", "max", partial(_memory, part))
            for part in ("weights", "activations", "gradients", "optimizer")
        ),
    )
}


def metrics_of(phase: str) -> list[Metric]:
    """Return the metrics of one phase's replies."""
    return [metric for metric in METRICS.values() if metric.phase == phase]


def client_metrics(scores: Iterable[Score]) -> dict[str, Metric]:
    """Return the metrics of clients' own examples in a run whose task has these scores."""
    return {metric.name: metric for metric in map(_of_score, scores)}


class Numbers:
    """The metrics that a round's clients stated, by client (partition id).

    Parameters
    ----------
    scores : Mapping[str, Metric]
        The metrics of the task's scores, which `METRICS` may lack.
    """

    def __init__(self, scores: Mapping[str, Metric] | None = None) -> None:
        self.declared = {**METRICS, **(scores or {})}
        self.rows: dict[int, dict[str, float]] = {}
        self._weights: dict[tuple[int, str], int] = {}

    def add(self, client: int, phase: str, stated: Mapping[str, float], examples: int) -> None:
        """Add the metrics of a reply; numbers that are not declared are left out.

        What a client states twice in a round, since it measured before and after its training, is added
        up if it is a total; of other numbers the larger one counts.

        Parameters
        ----------
        client : int
        phase : {"probe", "train", "evaluate"}
        stated : Mapping[str, float]
        examples : int
            The client's weight in a mean.
        """
        row = self.rows.setdefault(client, {})
        for metric in self.declared.values():
            if metric.phase == phase and metric.name in stated:
                value = stated[metric.name]
                if (before := row.get(metric.name)) is not None:
                    value = before + value if metric.total else max(before, value)
                row[metric.name] = value
                self._weights[client, metric.name] = examples

    def combined(self) -> dict[str, float | None]:
        """Return each metric, combined over all clients that stated it.

        If no client stated it, a sum or a maximum is 0 and a mean is None. Clients are combined in the
        order of their ids, so the result does not depend on the order of replies.
        """
        return {name: self._combined(metric) for name, metric in self.declared.items()}

    def examples(self, client: int, name: str) -> int | None:
        """Return the weight of a client's metric in a mean; None if the client did not state it."""
        return self._weights.get((client, name))

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
