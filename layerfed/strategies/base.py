"""SelectiveStrategy: a Flower strategy that runs the rounds of selective layer fine-tuning.

A round, in the order data flows: sample, probe, select, train, aggregate, evaluate, record. A concrete
strategy is a subclass that says which statistics it needs and how masks follow from them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from logging import INFO
from uuid import uuid4

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from layerfed.exchange import CODECS, LayerStore
from layerfed.models.layers import LayerMap
from layerfed.runs.checkpoint import Checkpoint
from layerfed.runs.records import Observer
from layerfed.server.aggregation import WEIGHTED_MEAN, Aggregation
from layerfed.server.budgets import Budgets
from layerfed.server.global_model import GlobalModel
from layerfed.server.holdings import Holdings
from layerfed.server.optimizers import SERVER_OPTIMIZERS, ServerOptimizer
from layerfed.server.population import Population, RoundFailed
from layerfed.server.resuming import restore, take
from layerfed.server.round import Round
from layerfed.server.transport import exchange
from layerfed.strategies.selecting import Selecting

__all__ = ["SelectiveStrategy"]

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class SelectiveStrategy(Selecting, Strategy):
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
    period : int (default: 1)
        k: layers are selected in every k-th round. In between, clients keep their masks and nothing is
        probed; one that was not there at the last selection is given masks within its own budget, see
        `server/memory.py`.
    theory : bool (default: False)
        Whether to probe in every round, to estimate E1 of `server/theory.py`, also where the selection
        needs no probe. Selection does not see it; its cost is counted, and a client whose probe fails
        drops out.
    client_evaluation : bool (default: False)
        Whether this round's clients evaluate the new model on their own held-out data.
    over_provision : float (default: 0)
        Share of clients sampled beyond `clients_per_round`; a round ends with the first
        `clients_per_round` updates, and those that come later are dropped.
    optimizer : ServerOptimizer, optional
        Turns mean updates into new layers; by default θ + Δ, as in the paper.
    aggregation : Aggregation, optional
        How the updates of a round become one; by default their weighted mean, as in the paper.
    codec : {"float32", "float16", "bfloat16", "int8"} (default: "float32")
        What clients write their updates in.
    store : LayerStore, optional
        The server's layer store: clients that see the same one are sent no layers.
    rounds : Callable[..., Round] (default: Round)
        Makes each round; `secured(…)` makes rounds whose single updates the server cannot see.
    seed : int (default: 0)
        Seed of sampling and of random masks.
    observers : Sequence[Observer] (default: ())
        Told of each phase and round: run folder, progress line.
    """

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
        period: int = 1,
        theory: bool = False,
        client_evaluation: bool = False,
        over_provision: float = 0.0,
        optimizer: ServerOptimizer | None = None,
        aggregation: Aggregation = WEIGHTED_MEAN,
        codec: str = "float32",
        store: LayerStore | None = None,
        rounds: Callable[..., Round] = Round,
        seed: int = 0,
        observers: Sequence[Observer] = (),
    ) -> None:
        super().__init__(layers, budget, period=period, theory=theory, seed=seed)
        self.clients_per_round = clients_per_round
        self.min_replies = min_replies
        self.lr_decay = lr_decay
        self.probe_batches = probe_batches
        self.client_evaluation = client_evaluation
        self.over_provision = over_provision
        self.optimizer = optimizer or SERVER_OPTIMIZERS["sgd"]()
        self.aggregation = aggregation
        self.codec = codec
        self.store = store
        self.rounds = rounds
        self.observers = tuple(observers)
        self.holdings = Holdings(store.identity if store is not None else "")
        self.population = Population(
            clients,
            at_least=clients_per_round or min_replies,
            num_blocks=layers.num_blocks,
            holdings=self.holdings,
            check=self.budgets.check_stated,
        )
        self.timeout = 3600.0
        self.model: GlobalModel | None = None
        self.round: Round
        """The round in progress; round 0 is the model as it came."""
        self.run_token = uuid4().hex
        """Names this run to clients that remember something of it (error feedback)."""
        self._late: dict[str, Message] = {}
        self._resumed: Checkpoint | None = None
        self.check()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Have `start` go on after a checkpoint, to the same end as if it had not stopped."""
        self._resumed = checkpoint

    def checkpoint(self) -> Checkpoint:
        """Return what `resume` needs to go on after the present round."""
        assert self.model is not None
        server_round = self.round.record.round
        return take(server_round, self.run_token, self.model, self.optimizer, self._memory)

    def connect(self, grid: Grid, timeout: float) -> None:
        """Wait for enough clients and ask each who it is; nothing to do where that is done.

        Raises
        ------
        ConfigError
            If the federation is not the one the strategy was configured for.
        RoundFailed
            If too few clients connect within `timeout` seconds.
        """
        if len(self.population.nodes) < self.population.at_least:
            for observer in self.observers:
                observer.on_phase(0, "connect")
            self.population.wait(grid, timeout)
            self.budgets.check_measured(map(self.population.description, self.population.nodes))

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
        done = 0
        if self._resumed is not None:
            restore(self._resumed, self.model, self.optimizer, self._memory)
            self.run_token, done = self._resumed.run_token, self._resumed.round
        result = Result(arrays=self.model.record())
        self.summary()
        self.connect(grid, timeout)
        self._publish(self.model.changed)
        self.round = Round(done, self.model, {}, timeout, self.holdings)
        self._evaluate_centrally(evaluate_fn, result)
        for observer in self.observers:
            observer.on_start(num_rounds, self.round.record.accuracy, done)

        for server_round in range(done + 1, num_rounds + 1):
            began = time.monotonic()
            # 1-3. sample, probe, select
            messages = self.configure_train(server_round, self.model.record(), train_config, grid)
            # 4-5. train, and aggregate as replies arrive
            with self._phase("train"):
                send = partial(exchange, grid, timeout=timeout, late=self._late)
                self._take_updates(self._exchange(grid, self.round.agree(messages, send)))
                self.round.unmask(send)
                self._finish()
            result.arrays = self.model.record()
            result.train_metrics_clientapp[server_round] = self._train_metrics()
            # 6. evaluate
            with self._phase("evaluate"):
                self._evaluate_on_clients(evaluate_config, grid, result)
                self._evaluate_centrally(evaluate_fn, result)
            # 7. record
            self.round.record.seconds = time.monotonic() - began
            for observer in self.observers:
                observer.on_round(self.round.record)
        return result

    # -------------------------------------------------------- Flower's four steps of a round
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample, probe and select; return the training messages."""
        model = self.model = self.model or GlobalModel(self.layers, arrays)
        if not self.population.refresh(grid, self.timeout, model.manifest()):
            raise RoundFailed(f"round {server_round}: no client is connected any more")
        nodes, codec, rules = self.population.nodes, CODECS[self.codec], self.aggregation
        examples = {client: self.population.description(client).examples for client in nodes}
        self.round = self.rounds(
            server_round, model, nodes, self.timeout, self.holdings, examples, codec, rules
        )
        record = self.round.record
        with self._phase("sample"):
            wanted = self.clients_per_round or len(self.population.nodes)
            asked = math.ceil(wanted * (1 + self.over_provision))
            clients = self.population.sample(asked, server_round, self.seed)
        with self._phase("probe"):
            # Half of the spare clients are for those that are slow or fail in the probe.
            statistics = self._probe(
                server_round, clients, grid, enough=math.ceil((wanted + asked) / 2)
            )
        with self._phase("select"):
            clients = [client for client in clients if client in statistics]
            if not clients:
                raise self.round.failed("probe", self.min_replies)
            described = [self.population.description(client) for client in clients]
            selection = record.selection = self.choose(server_round, described, statistics)
        lr = config.get("lr")
        if isinstance(lr, int | float):
            record.lr = lr * self.lr_decay ** (server_round - 1)
            config = ConfigRecord({**config, "lr": record.lr})
        for client in clients:
            record.ledger[client].full_down = model.bytes(self.layers.names)
        config = ConfigRecord({**config, "codec": self.codec, "run": self.run_token})
        configs = []
        for row, mask in enumerate(selection.choice.masks.astype(int).tolist()):
            own = self.instructions(selection.choice, row)
            configs.append({**config, "mask": mask, **own})
        return self.round.instructions("train", clients, configs)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold replies in one by one and update the layers somebody trained."""
        assert self.model is not None  # configure_train comes first
        self._take_updates((reply.metadata.src_node_id, reply) for reply in replies)
        self._finish()
        return self.model.record(), self._train_metrics()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask this round's clients to evaluate the new model, if that is wanted."""
        selection = self.round.record.selection
        if not self.client_evaluation or selection is None:
            return []
        return self.round.instructions(
            "evaluate", selection.clients, [dict(config)] * len(selection.clients)
        )

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the clients' metrics, weighted by their held-out examples."""
        means = self.round.take_evaluations((r.metadata.src_node_id, r) for r in replies)
        return self._client_metrics(means)

    def summary(self) -> None:
        """Log what will run."""
        layers = self.layers
        log(INFO, "%s strategy", self.name)
        log(INFO, "\t├── selectable layers: %d", layers.num_blocks)
        log(INFO, "\t├── always trained: head (%d parameters)", layers.head.elements)
        log(INFO, "\t├── frozen: embeddings (%d parameters)", layers.embeddings.elements)
        log(INFO, "\t├── budget: %s", self.budgets)
        log(INFO, "\t├── aggregation: %s", self.aggregation.rule)
        log(INFO, "\t├── rounds from one selection to the next: %d", self.period)
        log(INFO, "\t└── clients a round: %s", self.clients_per_round or "all")

    # --------------------------------------------------------------------- the pieces of a round
    def _exchange(
        self, grid: Grid, messages: Iterable[Message]
    ) -> Iterator[tuple[int, Message | None]]:
        """Send messages; yield replies as they arrive, after resending what clients lack."""
        return exchange(grid, messages, self.timeout, again=self.round.again, late=self._late)

    def _probe(
        self, server_round: int, clients: Sequence[int], grid: Grid, enough: int
    ) -> dict[int, dict[str, np.ndarray]]:
        """Ask clients for the statistics this round needs: {partition: {statistic: (L,)}}."""
        wanted = self.probed_in(server_round)
        if not wanted:
            return {client: {} for client in clients}
        config = {"statistics": list(wanted), "batches": self.probe_batches}
        messages = self.round.instructions("query.probe", clients, [config] * len(clients))
        return self.round.take_statistics(self._exchange(grid, messages), wanted, enough)

    def _take_updates(self, replies: Iterable[tuple[int, Message | None]]) -> None:
        """Fold updates in until enough are there."""
        record = self.round.record
        assert record.selection is not None
        asked = len(record.selection.clients)
        enough = min(asked, self.clients_per_round or asked)
        for answered, (node, reply) in enumerate(replies, start=1):
            self.round.take_update(node, reply)
            if record.replies == enough:
                record.late = asked - answered
                break

    def _finish(self) -> None:
        """Move the model, and put its new layers where clients of this machine find them."""
        assert self.model is not None
        self._publish(self.round.finish(self.min_replies, self.optimizer, self.applied))

    def _publish(self, layers: Iterable[str]) -> None:
        """Put new layers where clients of this machine find them."""
        assert self.model is not None
        if self.store is not None and self.holdings.anyone_shares:
            digests = self.model.manifest().digests
            for layer in layers:
                self.store.put(digests[layer], self.model.layer(layer), digests.values())

    def _train_metrics(self) -> MetricRecord:
        record = self.round.record
        loss = {} if record.train_loss is None else {"loss": record.train_loss}
        return MetricRecord({**loss, "replies": record.replies})

    def _evaluate_on_clients(self, config: ConfigRecord, grid: Grid, result: Result) -> None:
        assert self.model is not None
        number, arrays = self.round.record.round, self.model.record()
        messages = self.configure_evaluate(number, arrays, config, grid)
        means = self.round.take_evaluations(self._exchange(grid, messages))
        metrics = self._client_metrics(means)
        if metrics is not None:
            result.evaluate_metrics_clientapp[number] = metrics

    def _client_metrics(self, means: dict[str, float] | None) -> MetricRecord | None:
        if means is None:
            return None
        self.round.record.client_accuracy = means["accuracy"]
        return MetricRecord({"loss": means["loss"], "accuracy": means["accuracy"]})

    def _evaluate_centrally(self, evaluate_fn: EvaluateFn | None, result: Result) -> None:
        assert self.model is not None
        record = self.round.record
        metrics = evaluate_fn(record.round, self.model.record()) if evaluate_fn else None
        if metrics is None:
            return
        result.evaluate_metrics_serverapp[record.round] = metrics
        numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
        record.accuracy, record.loss = numbers.get("accuracy"), numbers.get("loss")

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Tell observers of a phase and take its time."""
        record = self.round.record
        for observer in self.observers:
            observer.on_phase(record.round, name)
        began = time.monotonic()
        yield
        record.seconds_by_phase[name] = time.monotonic() - began
