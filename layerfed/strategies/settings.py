"""`RoundSettings`: what a run asks of its rounds, the same for every strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from layerfed.exchange.scores import ACCURACY, LOSS, Score
from layerfed.server.aggregation import WEIGHTED_MEAN, Aggregation
from layerfed.server.skipping import Skipping
from layerfed.server.steps import Decoding, ServerStep, check_steps

__all__ = ["RoundSettings"]


@dataclass(frozen=True)
class RoundSettings:
    """Settings of a run's rounds, the same for every strategy.

    Attributes
    ----------
    clients_per_round : int | None (default: None)
        ``|S_t|``; None takes every connected client.
    clients : int | None (default: None)
        Size of the population, which nodes' statements are checked against; None takes the connected
        nodes.
    min_replies : int (default: 1)
        Updates that a round needs; with fewer the run stops with `RoundFailed`.
    over_provision : float (default: 0)
        Share of clients sampled beyond `clients_per_round`. A round ends with the first
        `clients_per_round` updates; later ones are dropped.
    lr_factor, server_lr_factor : Callable[[int], float]
        The `lr` of the train config, and that of the server's optimiser, are multiplied by these in
        each round, from 1.
    local_steps : Callable[[int], int] | None (default: None)
        τ_i, the local steps of a client by its number of examples. Strategies that change masks within
        a round need it.
    probe_batches : int (default: 0)
        Batches of a probe; 0 means the client's whole data.
    probe_examples : int (default: 0)
        Examples in such a batch; 0 means as many as in training.
    probe : {"before", "after"} (default: "before")
        When clients measure: before they are selected, at θ^t; or after their last training, in the same
        message, each at the model that its own training left, since θ^{t+1} is not known to it. A client
        that has not measured yet is probed before it is selected in any case.
    probe_share : float (default: 1)
        Share of the blocks that a probe measures, in turn (`Memory.part`); the client's last statistics
        of the others are used as they are. A client that has measured nothing yet measures all.
    period : int (default: 1)
        k: layers are selected in every k-th round. In between, clients keep their masks and nothing is
        probed. A client that missed the last selection gets masks within its own budget
        (`server/memory.py`).
    theory : bool (default: False)
        Whether to probe in every round to estimate E1 (`server/theory.py`), also if the selection needs
        no probe. The selection does not use this probe. Its cost is counted, and a client whose probe
        fails drops out.
    client_evaluation : bool (default: False)
        Whether the round's clients evaluate the new model on their own held-out data.
    codec : {"float32", "float16", "bfloat16", "int8"} (default: "float32")
        The codec in which clients write their updates.
    downlink_codec : {"float32", "float16", "bfloat16", "int8"} (default: "float32")
        The codec in which layers go to clients.
    deadline : float (default: 0)
        Seconds of a client's training, after which it sends the layers that it has finished; 0: none.
    skip : Skipping | None (default: None)
        The rule for the blocks that clients' networks leave out; None leaves out none.
    steps : tuple[ServerStep, ...] (default: ())
        The steps of updates on the server. `Decoding` is put in front unless one of these reads.
    aggregation : Aggregation
        The rule that combines the updates of a round; by default their weighted mean, as in the paper.
    scores : tuple[Score, ...] (default: accuracy and loss)
        The task's scores, by which models are evaluated.
    metric : Score (default: accuracy)
        The main one of them.
    seed : int (default: 0)
        Seed of sampling and of random masks.
    """

    clients_per_round: int | None = None
    clients: int | None = None
    min_replies: int = 1
    over_provision: float = 0.0
    lr_factor: Callable[[int], float] = lambda number: 1.0
    server_lr_factor: Callable[[int], float] = lambda number: 1.0
    local_steps: Callable[[int], int] | None = None
    probe_batches: int = 0
    probe_examples: int = 0
    probe: Literal["before", "after"] = "before"
    probe_share: float = 1.0
    period: int = 1
    theory: bool = False
    client_evaluation: bool = False
    codec: str = "float32"
    downlink_codec: str = "float32"
    deadline: float = 0.0
    skip: Skipping | None = None
    steps: tuple[ServerStep, ...] = ()
    aggregation: Aggregation = WEIGHTED_MEAN
    scores: tuple[Score, ...] = (ACCURACY, LOSS)
    metric: Score = ACCURACY
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse steps that would not do what they promise.

        Raises
        ------
        ConfigError
            If several steps read replies, one reads after another step, or a step that needs the sums of
            single updates would not see them.
        """
        check_steps(self.all_steps, self.aggregation.rule)

    @property
    def carries(self) -> bool:
        """Whether statistics of earlier rounds enter a selection."""
        return self.probe == "after" or self.probe_share < 1

    @property
    def all_steps(self) -> tuple[ServerStep, ...]:
        """The steps, with `Decoding` in front unless one of them reads replies."""
        reading = any(step.reads for step in self.steps)
        return self.steps if reading else (Decoding(), *self.steps)
