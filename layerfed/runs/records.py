"""The record of one round, which the strategy writes, the run folder keeps, and the report draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from layerfed.config.errors import Failed
from layerfed.exchange.metrics import Numbers
from layerfed.exchange.scores import ACCURACY, Score
from layerfed.runs.ledger import Ledger

__all__ = ["Choice", "Failure", "Observer", "RoundFailed", "RoundRecord", "SelectionRecord"]


@dataclass(frozen=True)
class Choice:
    """The masks of one round, shape (n, L), with a solver's certificate if a solver found them.

    `objective`, `bound` and `gap` are those of the solved problem. If its costs were rounded, `rounding`
    is the largest share of a budget that rounding took; the bound then holds for every selection that
    leaves that share of each budget unspent. 0 means exact costs.

    Attributes
    ----------
    masks : numpy.ndarray
        Booleans: the layers that each client trains in this round.
    schedules : Sequence[numpy.ndarray], optional
        For each client the masks that it trains one after the other, shape (S_i, L), if clients change
        their layers within the round. A client's row of `masks` is their union. Each single mask keeps
        to the budget.
    sent : numpy.ndarray, optional
        Booleans: the layers that each client sends, if those are not all that it trains.
    consistency : float, optional
        The relative λ that the strategy found, if it was not given.
    disagreement : float, optional
        The share of clients' updates that their mean loses, by which it was found.
    ranks : numpy.ndarray, optional
        The number of ranks of its adapters that each client trains, the first ones, shape (n,); by
        default all.
    """

    masks: np.ndarray
    solver: str = "rule"
    objective: float | None = None
    bound: float | None = None
    gap: float | None = None
    rounding: float = 0.0
    schedules: Sequence[np.ndarray] | None = None
    sent: np.ndarray | None = None
    consistency: float | None = None
    disagreement: float | None = None
    ranks: np.ndarray | None = None

    @property
    def sends(self) -> np.ndarray:
        """The layers that each client may send, shape (n, L)."""
        return self.masks if self.sent is None else self.sent

    def within(self, runs: np.ndarray) -> Choice:
        """Return this choice without the blocks that do not run, shape (n, L)."""
        schedules, sent = self.schedules, self.sent
        return replace(
            self,
            masks=self.masks & runs,
            schedules=schedules and [own & row for own, row in zip(schedules, runs, strict=True)],
            sent=None if sent is None else sent & runs,
        )

    def schedule(self, row: int) -> np.ndarray:
        """Return the masks that one client trains one after the other, shape (S_i, L)."""
        return self.masks[row : row + 1] if self.schedules is None else self.schedules[row]


@dataclass(frozen=True)
class Failure:
    """A client without a usable reply, with the phase and the reason."""

    partition: int
    phase: str
    reason: str


@dataclass(frozen=True)
class SelectionRecord:
    """A round's masks and all data behind them. Rows follow `clients`, columns `layers`.

    `statistics` were measured in this round, or in the rounds that `measured` names, shape (n, L), if
    some were measured earlier. Between two selections, `held` names the clients that keep
    their masks, and `assumed` has the statistics from which the other clients' masks were chosen. `runs`
    are the blocks that were not skipped, if some were.
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
    measured: np.ndarray | None = None
    runs: np.ndarray | None = None


class RoundFailed(Failed):
    """Error for a round with too few clients; the message has their number and the others' reasons."""


@dataclass
class RoundRecord:
    """The record of one round, which is filled in during the round.

    Attributes
    ----------
    accuracy, loss : float | None
        On the server's test set; no accuracy if the task has none.
    metric : Score
        The main score of the run.
    scores : Mapping[str, float | None]
        All scores on the server's test set, by name, with the loss; empty without an evaluation.
    groups : Mapping[str, Mapping[str, float | None]]
        The number of test examples and the scores of each group.
    lr, server_lr : float | None
        η and η_s of the round.
    replies : int
        Usable updates.
    clipped : int
        Updates that were scaled down to `server.clip`.
    late : int
        Clients that the round did not wait for, since enough others had answered, or that were out of
        time before they had finished a layer.
    numbers : Numbers
        The metrics that each client stated; `metrics` has them combined.
    moved : tuple[str, ...]
        Layers of the global model that changed.
    updated : dict[int, tuple[str, ...]]
        For each client (partition id), the moved layers to which it contributed.
    e1, e2, e2_masks : float | None
        The terms of the error floor (`server/theory.py`); `e2_masks` is the part of `e2` that the masks
        cause. None if they cannot be estimated.
    update_norm : float | None
        The median of the norms of clients' updates, after `server.clip`.
    epsilon : float | None
        The ε that the run has spent so far; `epsilon_covers` names what it covers.
    """

    round: int
    selection: SelectionRecord | None = None
    accuracy: float | None = None
    loss: float | None = None
    metric: Score = ACCURACY
    scores: Mapping[str, float | None] = field(default_factory=dict)
    groups: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    lr: float | None = None
    server_lr: float | None = None
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
        """The metrics that clients stated, combined over the clients: {metric: value}."""
        return self.numbers.combined()

    @property
    def value(self) -> float | None:
        """The main score on the server's test set; None without an evaluation."""
        two = {"accuracy": self.accuracy, "loss": self.loss}
        return {**two, **self.scores}.get(self.metric.name)


class Observer:
    """An object that a run calls at its events. A subclass overrides the methods that it needs."""

    def on_inputs(self, summary: str) -> None:
        """Note what the task chose for the model's inputs, before the first round; may be empty."""

    def on_start(self, rounds: int, before: RoundRecord, done: int = 0) -> None:
        """Note that the run begins, with the record of the model so far.

        Parameters
        ----------
        rounds : int
        before : RoundRecord
            It has the scores after `done` rounds, if the model was evaluated.
        done : int
            Rounds of before an interruption.
        """

    def on_phase(self, server_round: int, phase: str) -> None:
        """Note that a phase of a round begins."""

    def on_reply(self, server_round: int, done: int, asked: int) -> None:
        """Note that one more of the clients that were asked in this phase has answered."""

    def on_round(self, record: RoundRecord) -> None:
        """Note a finished round."""

    def on_close(self, status: str) -> None:
        """Note that the run is over, and its folder and pictures are written.

        The status is that of `summary.json`: completed, failed, interrupted or stopped.
        """

    def on_end(self, record: RoundRecord) -> None:
        """Note that the run ends after this round, planned or as asked."""
