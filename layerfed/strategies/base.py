"""SelectiveStrategy: a Flower strategy that runs the rounds of selective layer fine-tuning.

A round has seven phases, in the order of the data: sample, probe, select, train, aggregate, evaluate,
record. A concrete strategy is a subclass that names its statistics and turns them into masks.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from logging import INFO
from typing import Any, ClassVar, Literal, cast
from uuid import uuid4

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from pydantic import ValidationError

from layerfed.client.statistics import load_statistic
from layerfed.config import ConfigError, RunConfig, Section, explain, section_keys
from layerfed.exchange import Description, LayerStore, Probe, TrainInstruction
from layerfed.exchange.instruction import as_masks, train_config
from layerfed.models.layers import LayerMap
from layerfed.runs.checkpoint import Checkpoint
from layerfed.runs.records import Choice, Observer, RoundFailed, SelectionRecord
from layerfed.server.aggregation import Aggregator
from layerfed.server.budgets import Budgets
from layerfed.server.candidates import Candidates, check_choice
from layerfed.server.global_model import GlobalModel
from layerfed.server.holdings import Holdings
from layerfed.server.memory import HELD, Memory
from layerfed.server.optimizers import SERVER_OPTIMIZERS, ServerOptimizer
from layerfed.server.population import Population
from layerfed.server.resuming import restore, take
from layerfed.server.round import Round
from layerfed.server.steps import ServerStep
from layerfed.server.transport import exchange
from layerfed.strategies.settings import RoundSettings

__all__ = ["Masks", "SelectiveStrategy"]

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
Masks = Literal["shared", "within-budget", "own"]


class SelectiveStrategy(Strategy):
    """Federated fine-tuning in which each client trains only the layers selected for it.

    A concrete strategy names its statistics and overrides `select`, and seldom more.

    Parameters
    ----------
    layers : LayerMap
        The split of the model into layers; the same on server and clients.
    budget : Budgets | float (default: 1)
        R_i of each client. A number is a budget of that many layers for every client.
    settings : RoundSettings
    optimizer : ServerOptimizer, optional
        Turns mean updates into new layers; by default θ + Δ, as in the paper.
    store : LayerStore, optional
        The server's layer store. Clients that read the same store are sent no layers.
    observers : Sequence[Observer] (default: ())
        Called in each phase and round, for example the run folder and the progress line.
    **options
        The strategy's own options; see its `Options`.

    Raises
    ------
    ConfigError
        If an option is unknown or has a wrong value, or the strategy cannot work with these budgets.
    """

    class Options(Section):
        """The strategy's own settings; each field is a key `strategy.NAME`."""

    name: ClassVar[str]
    statistics: tuple[str, ...] = ()
    """Names of the statistics that `select` needs (`client/statistics.py`); () means no probe."""
    masks: ClassVar[Masks] = "within-budget"
    """Whether all clients of a round have the same mask: always ("shared"), if their budgets are equal
    ("within-budget"), or only by chance ("own")."""
    within_budget: ClassVar[bool] = True
    """Whether the strategy keeps to the run's budgets."""

    def __init__(
        self,
        layers: LayerMap,
        *,
        budget: Budgets | float = 1,
        settings: RoundSettings | None = None,
        optimizer: ServerOptimizer | None = None,
        store: LayerStore | None = None,
        observers: Sequence[Observer] = (),
        **options: Any,
    ) -> None:
        self.layers = layers
        self.budgets = budget if isinstance(budget, Budgets) else Budgets.identical(budget, layers)
        self.settings = settings = settings or RoundSettings()
        self.optimizer = optimizer or SERVER_OPTIMIZERS["sgd"]()
        self._server_lr = self.optimizer.lr
        self.store = store
        self.observers = tuple(observers)
        self.options: Any = self.read_options(options)
        self.holdings = Holdings(store.identity if store is not None else "")
        self.population = Population(
            settings.clients,
            at_least=settings.clients_per_round or settings.min_replies,
            num_blocks=layers.num_blocks,
            holdings=self.holdings,
            check=self.budgets.check_stated,
        )
        self.round: Round
        """The round in progress; round 0 is the initial model."""
        self.run_token = uuid4().hex
        """A name of this run, under which clients keep state between rounds (error feedback)."""
        self.timeout = 3600.0
        """Seconds to wait for replies, in each phase; `start` sets it."""
        self._model: GlobalModel | None = None
        self._memory = Memory()
        self._late: dict[str, Message] = {}
        self._resumed: Checkpoint | None = None
        self.check()
        share = settings.probe_share
        for name in self.statistics if share < 1 else ():
            if load_statistic(name).together:
                raise ConfigError(
                    f"strategy.probe-share = {share:g} does not go with the statistic {name}: a layer's "
                    "number depends on the other layers of the probe; set strategy.probe-share=1"
                )

    @classmethod
    def read_options(cls, options: Mapping[str, Any]) -> Section:
        """Check the strategy's own options and return them.

        Raises
        ------
        ConfigError
            If a key or value is not allowed; the message names the key, its value and what is allowed.
        """
        try:
            return cls.Options(**options)
        except ValidationError as error:
            raise ConfigError(
                explain(error, section_keys(cls.Options, "strategy."), "strategy.")
            ) from None

    # -------------------------------------------------------------- what a strategy may override
    @abstractmethod
    def select(self, candidates: Candidates) -> Choice:
        """Return the layers that each client trains: masks of shape (n, L) within the budgets."""

    @classmethod
    def masks_with(cls, options: Any) -> Masks:
        """Return the value of `masks` under these options; by default the class's own."""
        return cls.masks

    @classmethod
    def refuse(cls, options: Any, config: RunConfig) -> None:
        """Refuse settings that this strategy cannot work with; called before anything starts."""

    @classmethod
    def least(cls, costs: np.ndarray, layers: LayerMap) -> float:
        """Return the cost of the least that a client can train, given each layer's, shape (L,)."""
        return float(costs.min())

    @classmethod
    def exists(cls, config: RunConfig) -> bool:
        """Return whether the strategy is defined for a run; a comparison leaves out other runs."""
        return True

    def check(self) -> None:
        """Refuse budgets or settings that this strategy cannot work with; called once it is built."""

    def selects_in(self, server_round: int) -> bool:
        """Return whether layers are selected in a round, from 1; in other rounds masks are kept."""
        return (server_round - 1) % self.settings.period == 0

    def bounded(self, server_round: int) -> bool:
        """Return whether a round's masks must keep to the run's budgets."""
        return self.within_budget

    def instruct(self, instruction: TrainInstruction) -> TrainInstruction:
        """Return one client's instruction, with this strategy's changes; by default there are none."""
        return instruction

    def applied(self, mean: Aggregator) -> Collection[str]:
        """Return the trained layers that move the global model; by default all of them."""
        return mean.weights

    # ------------------------------------------------------------------------------ a whole run
    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Result:
        """Run the rounds, like Flower's own `start`, but aggregate replies as they arrive.

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
        should_stop : Callable[[], bool], optional
            Called after each round; the run ends when it returns True. Its last checkpoint is of that
            round, so that it can be resumed.

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
        self._model = model = self._global_model(initial_arrays)
        done = 0
        if self._resumed is not None:
            restore(self._resumed, model, self.optimizer, self._memory)
            self.run_token, done = self._resumed.run_token, self._resumed.round
        result = Result(arrays=model.record())
        self.summary()
        self.connect(grid, timeout)
        self._publish(model.changed)
        self.round = self._new_round(done, grid, timeout)
        self._evaluate_centrally(evaluate_fn, result)
        for observer in self.observers:
            observer.on_start(num_rounds, self.round.record, done)

        for server_round in range(done + 1, num_rounds + 1):
            began = time.monotonic()
            # 1-3. sample, probe, select
            messages = self.configure_train(server_round, model.record(), train_config, grid)
            # 4-5. train, and aggregate as replies arrive
            arrays, metrics = self.aggregate_train(server_round, self.round.exchange(messages))
            result.arrays = arrays
            result.train_metrics_clientapp[server_round] = metrics
            # 6. evaluate
            with self._phase("evaluate"):
                asked = self.configure_evaluate(server_round, arrays, evaluate_config, grid)
                found = self.aggregate_evaluate(server_round, self.round.exchange(asked))
                if found is not None:
                    result.evaluate_metrics_clientapp[server_round] = found
                self._evaluate_centrally(evaluate_fn, result)
            # 7. record
            self.round.record.seconds = time.monotonic() - began
            record = self.round.complete()
            for observer in self.observers:
                observer.on_round(record)
            if should_stop is not None and should_stop():
                log(INFO, "stopped after round %d, as asked", server_round)
                break
        for observer in self.observers:
            observer.on_end(self.round.record)
        return result

    # ---------------------------------------------------------- Flower's four steps of a round
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample, probe and select; return the training messages."""
        if self._model is None:  # Flower's steps without `start`
            self._model = self._global_model(arrays)
        settings = self.settings
        if not self.population.refresh(grid, self.timeout, self.model.sent.manifest()):
            raise RoundFailed(f"round {server_round}: no client is connected any more")
        self.round = self._new_round(server_round, grid, self.timeout, self.population.nodes)
        record = self.round.record
        with self._phase("sample"):
            wanted = settings.clients_per_round or len(self.population.nodes)
            asked = math.ceil(wanted * (1 + settings.over_provision) - 1e-9)
            clients = self.population.sample(asked, server_round, settings.seed)
        with self._phase("probe"):
            # Half of the spare clients are for those that are slow or fail in the probe.
            here = len(clients)
            statistics = self._probe(clients, enough=math.ceil((min(wanted, here) + here) / 2))
        with self._phase("select"):
            clients = [client for client in clients if client in statistics]
            if not clients:
                raise self.round.failed("probe", settings.min_replies)
            described = [self.population.description(client) for client in clients]
            selection = record.selection = self.choose(server_round, described, statistics)
        lr, rest = train_config(config)
        if lr is not None:
            record.lr = lr * settings.lr_factor(server_round)
        instructions, sent, ranks = {}, selection.choice.sent, selection.choice.ranks
        for row, client in enumerate(clients):
            record.ledger[client].full_down = self.model.bytes(self.layers.names)
            instructions[client] = self.instruct(
                TrainInstruction(
                    round=server_round,
                    masks=as_masks(selection.choice.schedule(row)),
                    run=self.run_token,
                    lr=record.lr,
                    codec=settings.codec,
                    deadline=settings.deadline,
                    runs=None if selection.runs is None else as_masks(selection.runs)[row],
                    sends=None if sent is None else as_masks(sent[row : row + 1])[0],
                    rank=int(ranks[row]) or None if ranks is not None else None,
                    probe=self._probe_after(server_round, client),
                    config=rest,
                )
            )
            if instructions[client].mask != tuple(selection.choice.masks[row].tolist()):
                raise ConfigError(f"strategy '{self.name}': `instruct` must not change the mask")
        with self._phase("train"):  # steps may exchange messages before the training
            return self.round.ask_to_train(instructions)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Add replies to the mean until there are enough, and move the layers that clients trained."""
        record = self.round.record
        asked = 0 if record.selection is None else len(record.selection.clients)
        self.optimizer.lr = self._server_lr * self.settings.server_lr_factor(server_round)
        record.server_lr = self.optimizer.lr
        with self._phase("train"):
            self.round.take_updates(replies, min(asked, self.settings.clients_per_round or asked))
            for client, (probe, rows) in self.round.after_training.items():
                self._memory.note(client, server_round, probe, rows)
            for client in record.updated:
                if any(map(self.layers.own, self.layers.trained(self.round.mask_of(client)))):
                    self.kept[f"personal/{client}"] = np.asarray(server_round)
            self._publish(
                self.round.finish(self.settings.min_replies, self.optimizer, self.applied)
            )
        if (disagreement := self.round.disagreement) is not None:
            self.kept["disagreement"] = np.asarray(disagreement)
        loss = record.metrics["train_loss"]
        stated = {} if loss is None else {"loss": loss}
        return self.model.record(), MetricRecord({**stated, "replies": record.replies})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the messages that ask this round's clients to evaluate the new model, if set."""
        selection = self.round.record.selection
        if not self.settings.client_evaluation or selection is None:
            return []
        configs = [dict(config)] * len(selection.clients)
        return self.round.messages("evaluate", selection.clients, configs)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the clients' metrics, weighted by their held-out examples."""
        self.round.take_evaluations(replies)
        metrics = self.round.record.metrics
        scores = {score.name: metrics[f"client_{score.name}"] for score in self.settings.scores}
        found = {name: value for name, value in scores.items() if value is not None}
        return MetricRecord(cast(Any, found)) if found else None

    def summary(self) -> None:
        """Log the settings of the run."""
        layers, settings = self.layers, self.settings
        log(INFO, "%s strategy", self.name)
        log(INFO, "\t├── selectable layers: %d", layers.num_blocks)
        log(INFO, "\t├── always trained: head (%d parameters)", layers.head.elements)
        log(INFO, "\t├── frozen: embeddings (%d parameters)", layers.embeddings.elements)
        log(INFO, "\t├── budget: %s", self.budgets)
        log(INFO, "\t├── aggregation: %s", settings.aggregation.rule)
        log(INFO, "\t├── rounds from one selection to the next: %d", settings.period)
        log(INFO, "\t└── clients a round: %s", settings.clients_per_round or "all")

    # ------------------------------------------------------------------------- a round's masks
    def probed_in(self, server_round: int) -> tuple[str, ...]:
        """Return the statistics that clients are asked for in a round; () means no probe."""
        wanted = self.statistics if self.selects_in(server_round) else ()
        if self.settings.theory and "grad_norm_sq" not in wanted:
            return (*wanted, "grad_norm_sq")
        return wanted

    def _probe(self, clients: Sequence[int], enough: int) -> dict[int, dict[str, np.ndarray]]:
        """Return the statistics that a round needs, {partition: {statistic: (L,)}}.

        Clients are asked for those that no earlier round gave (`RoundSettings.carries`).
        """
        number, settings = self.round.record.round, self.settings
        wanted = self.probed_in(number)
        found: dict[int, dict[str, np.ndarray]] = {}
        if not wanted or settings.probe == "after":
            known = {client: self._memory.given(client, wanted) for client in clients}
            found = {client: rows for client, rows in known.items() if len(rows) == len(wanted)}
        asked = {client: self._asked(client, wanted) for client in clients if client not in found}
        if not asked:
            return found
        configs = [probe.to_config() for probe in asked.values()]
        if (runs := self.runs(number, list(asked))) is not None:
            for config, own in zip(configs, runs, strict=True):
                config["runs"] = list(map(int, own))
        messages = self.round.messages("query.probe", list(asked), configs)
        # Of those that are asked the same share must answer as of all.
        enough = math.ceil(enough * len(asked) / len(clients))
        replies = self.round.take_statistics(self.round.exchange(messages), asked, enough)
        for client, rows in replies.items():
            if settings.carries:
                self._memory.note(client, number, asked[client], rows)
                rows = self._memory.given(client, wanted)
            found[client] = rows
        return found

    def _asked(self, client: int, statistics: tuple[str, ...]) -> Probe:
        """Return what a client is to measure: all blocks, or the part of them whose turn it is."""
        settings = self.settings
        part = self._memory.part(client, settings.probe_share, self.layers.num_blocks)
        (blocks,) = as_masks(part[None])
        return Probe(statistics, blocks, settings.probe_batches, settings.probe_examples)

    def _probe_after(self, server_round: int, client: int) -> Probe | None:
        """Return what a client is to measure after its training, for the selection of the next round."""
        wanted = self.probed_in(server_round + 1)
        return self._asked(client, wanted) if wanted and self.settings.probe == "after" else None

    def runs(self, server_round: int, clients: Sequence[int]) -> np.ndarray | None:
        """Return the blocks that run on each client, shape (n, L); None if all do.

        A draw lasts from one selection to the next, as masks do.
        """
        if self.settings.skip is None:
            return None
        while server_round > 1 and not self.selects_in(server_round):
            server_round -= 1
        seed, skip = self.settings.seed, self.settings.skip
        return np.stack([skip.runs(seed, server_round, client) for client in clients])

    def choose(
        self,
        server_round: int,
        clients: Sequence[Description],
        probed: Mapping[int, Mapping[str, np.ndarray]],
    ) -> SelectionRecord:
        """Turn statistics, costs and budgets into masks, or keep the masks of the last selection.

        Parameters
        ----------
        server_round : int
            t, from 1.
        clients : Sequence[Description]
        probed : Mapping[int, Mapping[str, numpy.ndarray]]
            {partition: {statistic: (L,)}}, for each of these clients.
        """
        statistics = {
            name: np.stack([probed[client.partition][name] for client in clients])
            for name in self.probed_in(server_round)
        }
        seed = self.settings.seed
        candidates = Candidates.of(server_round, clients, self.budgets, statistics, seed)
        counts = np.array([self.round.weight(int(each)) for each in candidates.examples])
        candidates = replace(candidates, counts=counts)
        costs, runs = candidates.costs, self.runs(server_round, candidates.clients)
        if runs is not None:
            candidates = candidates.running(runs)
        began = time.perf_counter()
        if selected := self.selects_in(server_round):
            candidates = replace(candidates, last=self._memory.last(candidates.clients))
            choice = self._checked(candidates)
            self._memory.learn(candidates, choice)
        else:
            candidates, choice = self._memory.complete(
                candidates, self._checked, bounded=self.bounded(server_round)
            )
        return SelectionRecord(
            clients=candidates.clients,
            layers=[block.name for block in self.layers.blocks],
            budgets=candidates.budgets,
            costs=costs,
            depth_costs=candidates.depth_costs,
            statistics=statistics,
            choice=choice,
            seconds=time.perf_counter() - began,
            held=[candidates.clients[row] for row in candidates.held],
            assumed={} if selected or choice.solver == HELD else candidates.statistics,
            runs=runs,
            measured=self._measured(server_round, candidates.clients) if statistics else None,
        )

    def _measured(self, server_round: int, clients: Sequence[int]) -> np.ndarray | None:
        """Return the rounds in which statistics were measured, shape (n, L); None if all in this one."""
        if not self.settings.carries:
            return None
        rounds = np.array([self._memory.measured(client) for client in clients], dtype=np.int64)
        return None if (rounds == server_round).all() else rounds

    def _checked(self, candidates: Candidates) -> Choice:
        choice = self.select(candidates)
        if not candidates.runs.all():
            check_choice(self.name, choice, candidates, bounded=False)
            choice = choice.within(candidates.runs)
        check_choice(self.name, choice, candidates, bounded=self.bounded(candidates.round))
        return choice

    # ------------------------------------------------------------- the model, clients and resuming
    @property
    def kept(self) -> dict[str, np.ndarray]:
        """Arrays that the strategy keeps from round to round; they are part of every checkpoint."""
        return self._memory.kept

    @property
    def model(self) -> GlobalModel:
        """The global model.

        Raises
        ------
        RuntimeError
            If the first round is not configured yet.
        """
        if self._model is None:
            raise RuntimeError("the strategy has no model before `start` or `configure_train`")
        return self._model

    def connect(self, grid: Grid, timeout: float) -> None:
        """Wait for enough clients and ask each to describe itself. A second call does nothing.

        Raises
        ------
        ConfigError
            If the federation does not fit the strategy's configuration.
        RoundFailed
            If too few clients connect within `timeout` seconds.
        """
        if len(self.population.nodes) < self.population.at_least:
            for observer in self.observers:
                observer.on_phase(0, "connect")
            self.population.wait(grid, timeout)
            self.budgets.check_measured(map(self.population.description, self.population.nodes))

    def add_step(self, step: ServerStep) -> None:
        """Append a step to the steps of updates."""
        self.settings = replace(self.settings, steps=(*self.settings.steps, step))

    def resume(self, checkpoint: Checkpoint) -> None:
        """Let `start` continue after a checkpoint, with the same result as an uninterrupted run."""
        self._resumed = checkpoint

    def checkpoint(self) -> Checkpoint:
        """Return the checkpoint from which `resume` continues after the present round."""
        server_round = self.round.record.round
        return take(server_round, self.run_token, self.model, self.optimizer, self._memory)

    def _new_round(
        self, number: int, grid: Grid, timeout: float, nodes: Mapping[int, int] | None = None
    ) -> Round:
        present = nodes or {}
        return Round(
            number,
            self.model,
            present,
            self.holdings,
            partial(exchange, grid, timeout=timeout, late=self._late, replied=self._replied),
            timeout,
            examples={client: self.population.description(client).examples for client in present},
            steps=self.settings.all_steps,
            aggregation=self.settings.aggregation,
            refused=self.population.ask_again,
            scores=self.settings.scores,
            metric=self.settings.metric,
            token=self.run_token,
            personal=lambda client: int(self.kept.get(f"personal/{client}", 0)),
        )

    def _global_model(self, arrays: ArrayRecord) -> GlobalModel:
        return GlobalModel(self.layers, arrays, self.settings.downlink_codec)

    def _publish(self, layers: Iterable[str]) -> None:
        """Put new layers into the server's store, if a client reads it."""
        if self.store is not None and self.holdings.anyone_shares:
            sent = self.model.sent
            digests = sent.manifest().digests
            for layer in layers:
                self.store.put(digests[layer], sent.layer(layer), digests.values())

    def _evaluate_centrally(self, evaluate_fn: EvaluateFn | None, result: Result) -> None:
        record = self.round.record
        if self.layers.kept and self.settings.client_evaluation:
            # Nobody else has what stays on clients.
            found = {s.name: record.metrics[f"client_{s.name}"] for s in self.settings.scores}
            numbers = {name: value for name, value in found.items() if value is not None}
            metrics = MetricRecord(cast(Any, numbers)) if numbers else None
        else:
            metrics = evaluate_fn(record.round, self.model.record()) if evaluate_fn else None
        if metrics is None:
            return
        result.evaluate_metrics_serverapp[record.round] = metrics
        numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
        record.accuracy, record.loss = numbers.get("accuracy"), numbers.get("loss")
        record.scores = {**dict.fromkeys((s.name for s in self.settings.scores), None), **numbers}

    def _replied(self, done: int, asked: int) -> None:
        for observer in self.observers:
            observer.on_reply(self.round.record.round, done, asked)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Tell observers that a phase begins, and measure its time."""
        record = self.round.record
        for observer in self.observers:
            observer.on_phase(record.round, name)
        began = time.monotonic()
        yield
        passed = record.seconds_by_phase.get(name, 0.0) + time.monotonic() - began
        record.seconds_by_phase[name] = passed
