"""What one round leaves behind. Written by the strategy, kept by the run folder, drawn by the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from layerfed.config.errors import Failed
from layerfed.exchange.metrics import Numbers
from layerfed.runs.ledger import Ledger

__all__ = ["Choice", "Failure", "Observer", "RoundFailed", "RoundRecord", "SelectionRecord"]


@dataclass(frozen=True)
class Choice:
    """The masks of one round, shape (n, L), and, where a solver found them, how good they are.

    `objective`, `bound` and `gap` are those of the problem that was solved. Where its costs were
    rounded, `rounding` is the share of a budget that this may have taken: the bound then holds for
    every selection that leaves as much of each budget unspent. 0 means the costs as they are.

    Attributes
    ----------
    masks : numpy.ndarray
        Booleans: the layers that each client trains in this round.
    schedules : Sequence[numpy.ndarray], optional
        Where clients change their layers within the round: for each client the masks that it trains one
        after the other, shape (S_i, L). Its row of `masks` is their union, and each one by itself keeps
        to the budget.
    """

    masks: np.ndarray
    solver: str = "rule"
    objective: float | None = None
    bound: float | None = None
    gap: float | None = None
    rounding: float = 0.0
    schedules: Sequence[np.ndarray] | None = None

    def schedule(self, row: int) -> np.ndarray:
        """Return the masks that one client trains one after the other, shape (S_i, L)."""
        return self.masks[row : row + 1] if self.schedules is None else self.schedules[row]


@dataclass(frozen=True)
class Failure:
    """A client that gave nothing usable, in which phase, and why."""

    partition: int
    phase: str
    reason: str


@dataclass(frozen=True)
class SelectionRecord:
    """Everything that led to a round's masks. Rows follow `clients`, columns `layers`.

    `statistics` were probed in this round. Between two selections, `held` names the clients that keep
    their masks, and `assumed` holds the statistics from which those of the others were chosen.
    """

    clients: Sequence[int]
    layers: Sequence[str]
    budgets: np.ndarray
    costs: np.ndarray
    depth_costs: np.ndarray
    statistics: Mapping[str, np.ndarray]
    choice: Choice
    seconds: float
    held: Sequence[int] = ()
    assumed: Mapping[str, np.ndarray] = field(default_factory=dict)


class RoundFailed(Failed):
    """Too few clients to go on; the message says how many there were and why the others failed."""


@dataclass
class RoundRecord:
    """One round, filled in as it goes.

    Attributes
    ----------
    accuracy, loss : float | None
        On the server's test set.
    lr : float | None
        η of the round.
    replies : int
        Usable updates.
    clipped : int
        Updates that were scaled down to `server.clip`.
    late : int
        Clients whose training nobody waited for, since enough others had answered.
    numbers : Numbers
        What clients stated of their work, by client; `metrics` has them combined.
    moved : tuple[str, ...]
        Layers of the global model that changed.
    updated : dict[int, tuple[str, ...]]
        For each client (partition id), the layers among them to which it contributed.
    e1, e2, e2_masks : float | None
        The terms of the error floor (`server/theory.py`); `e2_masks` is the part of `e2` that the masks
        cause. None where there is nothing to estimate them from.
    update_norm : float | None
        The median of the norms of clients' updates, as they were read.
    epsilon : float | None
        What the run has spent of privacy so far, on what `epsilon_covers` names.
    """

    round: int
    selection: SelectionRecord | None = None
    accuracy: float | None = None
    loss: float | None = None
    lr: float | None = None
    replies: int = 0
    clipped: int = 0
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    late: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    numbers: Numbers = field(default_factory=Numbers)
    moved: tuple[str, ...] = ()
    updated: dict[int, tuple[str, ...]] = field(default_factory=dict)
    e1: float | None = None
    e2: float | None = None
    e2_masks: float | None = None
    update_norm: float | None = None
    epsilon: float | None = None
    epsilon_covers: str | None = None

    @property
    def metrics(self) -> dict[str, float | None]:
        """What clients stated, combined over them: {metric: value}."""
        return self.numbers.combined()


class Observer:
    """Is told what happens in a run. Subclasses override what they care about."""

    def on_start(self, rounds: int, accuracy: float | None, done: int = 0) -> None:
        """Take note that the run begins, after `done` rounds of an earlier life, and how it scores."""

    def on_phase(self, server_round: int, phase: str) -> None:
        """Take note that a phase of a round begins."""

    def on_round(self, record: RoundRecord) -> None:
        """Take note of a finished round."""
