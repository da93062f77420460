"""SelectiveStrategy: a Flower strategy that runs the rounds of selective layer fine-tuning.

A round, in the order data flows: sample, probe, select, train, aggregate, evaluate, record. A concrete
strategy is a subclass that says which statistics it needs and how masks follow from them.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from layerfed.aggregation import MaskedMean
from layerfed.budgets import Budgets
from layerfed.exchange import (
    GlobalModel,
    RefusedReply,
    exchange,
    instruction,
    read_evaluation,
    read_statistics,
    read_train_reply,
)
from layerfed.layers import LayerMap
from layerfed.records import Choice, Failure, Observer, RoundRecord, SelectionRecord
from layerfed.strategies.population import Population, RoundFailed

__all__ = ["Candidates", "SelectiveStrategy"]

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


@dataclass(frozen=True)
class Candidates:
    """What a strategy selects from: n sampled clients and L selectable layers.

    Attributes
    ----------
    round : int
        The round t, from 1.
    clients : Sequence[int]
        Partition ids, length n.
    budgets : numpy.ndarray
        R_i, shape (n,).
    costs : numpy.ndarray
        c_l, shape (L,), in the unit of the budgets.
    statistics : Mapping[str, numpy.ndarray]
        Each statistic the strategy asked for, shape (n, L).
    seed : int
        The run's seed.
    """

    round: int
    clients: Sequence[int]
    budgets: np.ndarray
    costs: np.ndarray
    statistics: Mapping[str, np.ndarray]
    seed: int


class SelectiveStrategy(Strategy):
    """Federated fine-tuning in which each client trains only the layers selected for it.

    Parameters
    ----------
    layers : LayerMap
        How the model falls into layers; the same on server and clients.
    budget : Budgets | float (default: 1)
        R_i of each client; a number is a budget of so many layers for everyone.
    clients_per_round : int | None (default: None)
        |S_t|; None takes every connected client.
    clients : int | None (default: None)
        Size of the population, checked against what nodes say; None takes whoever is connected.
    min_replies : int (default: 1)
        Updates a round needs; with fewer the run stops with `RoundFailed`.
    lr_decay : float (default: 1.0)
        The `lr` of the train config is multiplied by this after each round.
    probe_batches : int (default: 0)
        Batches a probe goes over; 0 means the client's whole data.
    client_evaluation : bool (default: False)
        Whether this round's clients evaluate the new model on their own held-out data.
    seed : int (default: 0)
        Seed of sampling and of random masks.
    observers : Sequence[Observer] (default: ())
        Told of each phase and round: run folder, progress line, trackers.
    """

    name: ClassVar[str]
    statistics: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        layers: LayerMap,
        *,
        budget: Budgets | float = 1,
        clients_per_round: int | None = None,
        clients: int | None = None,
        min_replies: int = 1,
        lr_decay: float = 1.0,
        probe_batches: int = 0,
        client_evaluation: bool = False,
        seed: int = 0,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.layers = layers
        self.budgets = budget if isinstance(budget, Budgets) else Budgets.identical(budget, layers)
        self.clients_per_round = clients_per_round
        self.min_replies = min_replies
        self.lr_decay = lr_decay
        self.probe_batches = probe_batches
        self.client_evaluation = client_evaluation
        self.seed = seed
        self.observers = tuple(observers)
        self.population = Population(clients, at_least=clients_per_round or min_replies)
        self.timeout = 3600.0
        self.model: GlobalModel | None = None
        self._record = RoundRecord(0)
        self._asked: dict[int, int] = {}
        self._losses: dict[int, tuple[int, float]] = {}
        self.check()

    def check(self) -> None:
        """Refuse settings this strategy cannot work with, before any client does."""

    @abstractmethod
    def select(self, candidates: Candidates) -> Choice:
        """Choose the layers each client trains: masks of shape (n, L) within the budgets."""

    # ------------------------------------------------------------------------------- the loop
    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run the rounds. Like Flower's own `start`, but folds replies in as they arrive.

        Parameters
        ----------
        grid : flwr.serverapp.Grid
        initial_arrays : flwr.app.ArrayRecord
            The pretrained model: all its tensors by state-dict name.
        num_rounds : int
        timeout : float
            Seconds to wait for replies, in each phase.
        train_config, evaluate_config : flwr.app.ConfigRecord, optional
            Sent with each train or evaluate message.
        evaluate_fn : Callable[[int, ArrayRecord], MetricRecord | None], optional
            Called with round 0 and after each round.

        Returns
        -------
        flwr.serverapp.strategy.Result
            The final model and the metrics of every round.

        Raises
        ------
        RoundFailed
            If fewer than `min_replies` clients gave a usable update.
        """
        train_config = train_config or ConfigRecord()
        evaluate_config = evaluate_config or ConfigRecord()
        self.timeout = timeout
        self.model = GlobalModel(self.layers, initial_arrays)
        result = Result(arrays=initial_arrays)
        self.summary()
        self._evaluate_centrally(0, evaluate_fn, result)
        for observer in self.observers:
            observer.on_start(num_rounds, self._record.accuracy)
        with self._phase("connect", 0):
            self.population.wait(grid, timeout)

        for server_round in range(1, num_rounds + 1):
            began = time.monotonic()
            messages = self.configure_train(
                server_round, self.model.record(), train_config, grid
            )
            with self._phase("train"):
                mean = MaskedMean(self.layers)
                for node, reply in exchange(grid, messages, timeout):
                    self._fold(mean, node, reply)
                self._finish(mean)
            result.arrays = self.model.record()
            result.train_metrics_clientapp[server_round] = self._train_metrics()
            with self._phase("evaluate"):
                self._evaluate_on_clients(server_round, evaluate_config, grid, result)
                self._evaluate_centrally(server_round, evaluate_fn, result)
            self._record.seconds = time.monotonic() - began
            for observer in self.observers:
                observer.on_round(self._record)
        return result

    # -------------------------------------------------------- Flower's four steps of a round
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample, probe and select; return the training messages."""
        if self.model is None:
            self.model = GlobalModel(self.layers, arrays)
        self._record, self._losses = RoundRecord(server_round), {}
        with self._phase("sample"):
            self.population.refresh(grid, self.timeout)
            clients = self.population.sample(
                self.clients_per_round or len(self.population.nodes), server_round, self.seed
            )
        with self._phase("probe"):
            statistics = self._probe(clients, grid)
        with self._phase("select"):
            selection = self._select([c for c in clients if c in statistics], statistics)
        lr = config.get("lr")
        if isinstance(lr, float):
            self._record.lr = lr * self.lr_decay ** (server_round - 1)
            config = ConfigRecord({**config, "lr": self._record.lr})
        full = self.model.bytes(self.layers.names)
        self._record.bytes_full_down = full * len(selection.clients)
        return self._instructions(
            "train",
            selection.clients,
            [{**config, "mask": row.astype(int).tolist()} for row in selection.choice.masks],
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold replies in one by one and update the layers somebody trained."""
        assert self.model is not None  # configure_train comes first
        mean = MaskedMean(self.layers)
        for reply in replies:
            self._fold(mean, reply.metadata.src_node_id, reply)
        self._finish(mean)
        return self.model.record(), self._train_metrics()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask this round's clients to evaluate the new model, if that is wanted."""
        if not self.client_evaluation or self._record.selection is None:
            return []
        clients = self._record.selection.clients
        return self._instructions("evaluate", clients, [dict(config) for _ in clients])

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the clients' metrics, weighted by their held-out examples."""
        found: list[tuple[int, dict[str, float]]] = []
        for reply in replies:
            partition = self._asked.get(reply.metadata.src_node_id, -1)
            try:
                if reply.has_error():
                    raise RefusedReply(reply.error.reason)
                found.append(read_evaluation(reply))
            except RefusedReply as error:
                self._fail(partition, "evaluate", str(error))
        total = sum(examples for examples, _ in found)
        if not total:
            return None
        means = {k: sum(n * m[k] for n, m in found) / total for k in ("loss", "accuracy")}
        self._record.client_accuracy = means["accuracy"]
        return MetricRecord({"loss": means["loss"], "accuracy": means["accuracy"]})

    def summary(self) -> None:
        """Log what will run."""
        embeddings, head = self.layers.embeddings, self.layers.head
        log(INFO, "%s strategy", self.name)
        log(INFO, "\t├── selectable layers: %d", self.layers.num_blocks)
        log(INFO, "\t├── always trained: head (%d parameters)", head.elements)
        log(INFO, "\t├── never trained: embeddings (%d parameters)", embeddings.elements)
        log(INFO, "\t├── budget: %s", self.budgets)
        log(INFO, "\t└── clients a round: %s", self.clients_per_round or "all")

    # --------------------------------------------------------------------- the pieces of a round
    def _instructions(
        self, kind: str, clients: Sequence[int], configs: Sequence[dict[str, Any]]
    ) -> list[Message]:
        """Build one message a client; all share the same serialised layers."""
        assert self.model is not None
        manifest, payload = self.model.manifest(), self.model.payload()
        self._record.bytes_down += self.model.bytes(self.model.changed) * len(clients)
        self._asked = {self.population.nodes[client]: client for client in clients}
        return [
            instruction(
                kind,
                self.population.nodes[client],
                server_round=self._record.round,
                timeout=self.timeout,
                manifest=manifest,
                arrays=payload,
                **config,
            )
            for client, config in zip(clients, configs, strict=True)
        ]

    def _probe(self, clients: Sequence[int], grid: Grid) -> dict[int, dict[str, np.ndarray]]:
        """Ask clients for the statistics the strategy needs: {partition: {statistic: (L,)}}."""
        if not self.statistics:
            return {client: {} for client in clients}
        config = {"statistics": list(self.statistics), "batches": self.probe_batches}
        messages = self._instructions("query.probe", clients, [config] * len(clients))
        found: dict[int, dict[str, np.ndarray]] = {}
        for node, reply in exchange(grid, messages, self.timeout):
            partition = self._asked[node]
            try:
                answer = _content(reply)
                rows, costs = read_statistics(answer, self.statistics, self.layers.num_blocks)
            except RefusedReply as error:
                self._fail(partition, "probe", str(error))
                continue
            found[partition] = rows
            self._record.flops_probe += costs.get("flops", 0.0)
            self._record.bytes_up += sum(row.nbytes for row in rows.values())
        return found

    def _select(
        self, clients: Sequence[int], statistics: Mapping[int, Mapping[str, np.ndarray]]
    ) -> SelectionRecord:
        """Turn statistics, costs and budgets into masks."""
        if not clients:
            raise RoundFailed(self._why_none("probe"))
        budgets = np.array([self.budgets.of(self.population.description(c)) for c in clients])
        table = {
            name: np.stack([statistics[client][name] for client in clients])
            for name in self.statistics
        }
        began = time.perf_counter()
        choice = self.select(
            Candidates(
                self._record.round, clients, budgets, self.budgets.costs, table, self.seed
            )
        )
        self._record.selection = SelectionRecord(
            clients=clients,
            layers=[block.name for block in self.layers.blocks],
            budgets=budgets,
            costs=self.budgets.costs,
            statistics=table,
            choice=choice,
            seconds=time.perf_counter() - began,
        )
        return self._record.selection

    def _trained_by(self, partition: int) -> list[str]:
        """Names of the layers a client was asked to train: its mask's blocks, and the head."""
        selection = self._record.selection
        assert selection is not None
        row = selection.choice.masks[list(selection.clients).index(partition)]
        return [name for name, on in zip(selection.layers, row, strict=True) if on] + ["head"]

    def _fold(self, mean: MaskedMean, node: int, reply: Message | None) -> None:
        """Check one training reply and add it to the mean, or log why it is refused."""
        assert self.model is not None
        partition = self._asked.get(node, -1)
        try:
            answer = _content(reply)
            if partition < 0:
                raise RefusedReply(f"node {node} was not asked")
            trained = self._trained_by(partition)
            expected = {t: v for name in trained for t, v in self.model.layer(name).items()}
            train = read_train_reply(answer, expected)
        except RefusedReply as error:
            self._fail(partition, "train", str(error))
            return
        mean.add(trained, train.update, train.examples)
        record, metrics = self._record, train.metrics
        record.replies += 1
        record.bytes_up += self.model.bytes(trained)
        record.bytes_full_up += self.model.bytes(self.layers.names)
        record.flops += metrics.get("flops", 0.0)
        record.peak_memory = max(record.peak_memory, metrics.get("peak-memory", 0.0))
        self._losses[partition] = (train.examples, metrics["loss"])

    def _finish(self, mean: MaskedMean) -> None:
        """Move every layer somebody trained; the others stay bit-identical."""
        assert self.model is not None
        if self._record.replies < self.min_replies:
            raise RoundFailed(self._why_none("train"))
        for layer in mean.weights:
            self.model.replace(layer, mean.apply(layer, self.model.layer(layer)))
        # In the order of partition ids, so that the figure does not depend on who answered first.
        losses = [self._losses[partition] for partition in sorted(self._losses)]
        self._record.train_loss = sum(n * x for n, x in losses) / sum(n for n, _ in losses)

    def _train_metrics(self) -> MetricRecord:
        assert self._record.train_loss is not None
        return MetricRecord({"loss": self._record.train_loss, "replies": self._record.replies})

    def _evaluate_on_clients(
        self, server_round: int, config: ConfigRecord, grid: Grid, result: Result
    ) -> None:
        assert self.model is not None
        messages = self.configure_evaluate(server_round, self.model.record(), config, grid)
        replies = (r for _, r in exchange(grid, messages, self.timeout) if r is not None)
        metrics = self.aggregate_evaluate(server_round, replies)
        if metrics is not None:
            result.evaluate_metrics_clientapp[server_round] = metrics

    def _evaluate_centrally(
        self, server_round: int, evaluate_fn: EvaluateFn | None, result: Result
    ) -> None:
        assert self.model is not None
        metrics = evaluate_fn(server_round, self.model.record()) if evaluate_fn else None
        if metrics is None:
            return
        result.evaluate_metrics_serverapp[server_round] = metrics
        numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
        self._record.accuracy = numbers.get("accuracy")
        self._record.loss = numbers.get("loss")

    @contextmanager
    def _phase(self, name: str, server_round: int | None = None) -> Iterator[None]:
        """Tell observers of a phase and take its time."""
        record = self._record
        for observer in self.observers:
            observer.on_phase(record.round if server_round is None else server_round, name)
        began = time.monotonic()
        yield
        record.seconds_by_phase[name] = time.monotonic() - began

    def _fail(self, partition: int, phase: str, reason: str) -> None:
        self._record.failures.append(Failure(partition, phase, reason))
        log(WARNING, "round %d: client %d in %s: %s", self._record.round, partition, phase, reason)

    def _why_none(self, phase: str) -> str:
        reasons = "; ".join(f"client {f.partition}: {f.reason}" for f in self._record.failures[:5])
        return (
            f"round {self._record.round}: {self._record.replies} usable replies in {phase}, "
            f"{self.min_replies} are needed (federation.min-replies). {reasons}"
        )


def _content(reply: Message | None) -> Message:
    if reply is None:
        raise RefusedReply("no reply in time")
    if reply.has_error():
        raise RefusedReply(reply.error.reason)
    return reply
