"""The ServerApp: reads the configuration, builds the strategy, runs it, and closes the run folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from logging import INFO, WARNING
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.exit import add_exit_handler

from layerfed.client.flops import forward_flops
from layerfed.client.training import evaluate
from layerfed.client_app import node_store, workbench
from layerfed.config import ConfigError, RunConfig
from layerfed.exchange import LayerStore, record_of
from layerfed.models.layers import LayerMap, layer_costs
from layerfed.privacy.account import PrivacyAccount
from layerfed.privacy.private_mean import PrivateAggregation
from layerfed.privacy.protection import refuse_buffers
from layerfed.report import draw_run
from layerfed.runs import Checkpoints, LogLines, NotWritten, RunFolder, latest_checkpoint, lock
from layerfed.runs.records import Observer
from layerfed.server.aggregation import Aggregation
from layerfed.server.budgets import Budgets
from layerfed.server.optimizers import SERVER_OPTIMIZERS
from layerfed.server.population import RoundFailed, federation_size
from layerfed.server.resuming import check_base
from layerfed.server.round import Round
from layerfed.server.secure_round import secured
from layerfed.strategies import STRATEGIES, SelectiveStrategy

__all__ = ["build_account", "build_server_app", "build_strategy", "run", "server_app"]

# What a run's clients work on, by the grid Flower hands to the ServerApp.
ENGINES = {"InProcessGrid": "inprocess", "InMemoryGrid": "ray"}


def build_strategy(
    config: RunConfig, layers: LayerMap, store: LayerStore | None = None
) -> SelectiveStrategy:
    """Build the strategy that a configuration names, for a model of these layers.

    Clients that see the same layer store as the server are sent no layers.

    Raises
    ------
    ConfigError
        If budgets, strategy or privacy do not fit the model.
    """
    if config.privacy.mode != "none":
        refuse_buffers(layers)
    section = config.strategy
    strategy = STRATEGIES[section.name]
    costs = layer_costs(layers, config.budget.unit)
    return strategy(
        layers,
        budget=Budgets(config.budget, costs, config.run.seed, kept=strategy.within_budget),
        clients_per_round=config.federation.cohort,
        clients=config.federation.population,
        min_replies=config.federation.needed_replies,
        lr_decay=config.train.lr_decay,
        probe_batches=section.probe_batches,
        period=section.period,
        theory=section.theory,
        client_evaluation=config.task.local_test > 0,
        over_provision=config.federation.over_provision,
        optimizer=SERVER_OPTIMIZERS[config.server.optimizer](
            config.server.lr, config.server.momentum, config.server.beta2, config.server.tau
        ),
        aggregation=_aggregation(config),
        codec=config.exchange.codec,
        store=store,
        rounds=secured(config.secagg) if config.secagg.enabled else Round,
        seed=config.run.seed,
        **strategy.options(config),
    )


def _aggregation(config: RunConfig) -> Aggregation:
    """Return how a round's updates become one."""
    server, privacy = config.server, config.privacy
    if privacy.mode == "central":
        return PrivateAggregation(bound=privacy.clip, noise=privacy.noise)
    return Aggregation(server.aggregation, server.trim, server.clip, config.federation.max_examples)


def build_account(config: RunConfig, strategy: SelectiveStrategy) -> PrivacyAccount | None:
    """Return what accounts for the run's privacy; None where it promises none.

    Raises
    ------
    ConfigError
        If the accountant is not installed.
    """
    if config.privacy.mode == "none":
        return None
    return PrivacyAccount(config.privacy, strategy.probed_in, config.federation.rounds)


def run(
    grid: Grid,
    context: Context,
    observers: Sequence[Observer],
    opened: Callable[[RunFolder], None],
) -> Path:
    """Run what the context's run configuration describes; return the run folder.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
    context : flwr.app.Context
    observers : Sequence[Observer]
    opened : Callable[[RunFolder], None]
        Called with the run folder once it exists, before the first round.

    Raises
    ------
    ConfigError
        If the configuration cannot be run; nothing is written then, and no client has worked.
    RoundFailed
        If too few clients took part; the run folder says so too.
    NotWritten
        If the run folder cannot be written any more; what it holds is whole, and can be resumed.
    """
    config = RunConfig.from_flat(context.run_config)
    # Before it is read how far it got: the process that wrote it may still be at it.
    held = lock(Path(config.run.resume)) if config.run.resume else None
    try:
        return _run(config, grid, context, observers, opened)
    finally:
        if held is not None:
            held.release()


def _run(
    config: RunConfig,
    grid: Grid,
    context: Context,
    observers: Sequence[Observer],
    opened: Callable[[RunFolder], None],
) -> Path:
    bench = workbench(context.run_config)
    test = bench.task.test_examples()
    if not config.federation.clients:
        config = config.of_size(federation_size(grid, config.federation.timeout))
    strategy = build_strategy(config, bench.resident.layers, node_store(context))
    account = build_account(config, strategy)

    def evaluate_globally(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round % config.run.evaluate_every and server_round != config.federation.rounds:
            return None
        # Read from the strategy's own tensors: only layers that changed are copied to the device.
        assert strategy.model is not None
        bench.resident.move_to(strategy.model.manifest(), strategy.model.tensors)
        batches = test.in_order(256, bench.device)
        accuracy, loss = evaluate(bench.resident.model, batches, bench.task.logits)
        return MetricRecord({"accuracy": accuracy, "loss": loss})

    strategy.observers = tuple(observers)
    resumed = None
    if config.run.resume:
        resumed = latest_checkpoint(Path(config.run.resume))
        if resumed is None:
            raise ConfigError(
                f"run.resume = '{config.run.resume}' holds no checkpoint that can be used; start the "
                "run anew, under another run.name"
            )
        # Before anything of the run folder is touched.
        check_base(resumed, bench.resident.base)
        strategy.resume(resumed)
    strategy.connect(grid, config.federation.timeout)
    engine = ENGINES.get(type(grid).__name__, "superlink")
    if resumed is None:
        entered = RunFolder.create(config, engine)
    else:
        entered = RunFolder.reopen(Path(config.run.resume), config, engine, resumed.round)
    with entered as folder:
        opened(folder)
        example = next(iter(test.in_order(1, bench.device)))
        flops = forward_flops(bench.resident.model, strategy.layers, example, bench.task.logits)
        folder.describe(strategy.layers, *flops)
        strategy.observers = (folder, *observers)
        if account is not None:
            account.recall(folder.asked(), folder.repeated_rounds)
            # First: what it notes is what the others write and show.
            strategy.observers = (account, *strategy.observers)
        if config.run.checkpoint_every:
            strategy.observers += (
                Checkpoints(
                    folder.path,
                    strategy.checkpoint,
                    config.run.checkpoint_every,
                    config.run.checkpoints,
                ),
            )
        strategy.start(
            grid,
            record_of(bench.resident.base_state()),
            num_rounds=config.federation.rounds,
            timeout=config.federation.timeout,
            train_config=ConfigRecord({"lr": config.train.lr}),
            evaluate_fn=evaluate_globally,
        )
        assert strategy.model is not None
        folder.finish(strategy.model.tensors)
    try:
        draw_run(folder.path)
    except OSError as error:
        log(WARNING, "no pictures: %s; `layerfed report %s` draws them", error, folder.path)
    return folder.path


def build_server_app(
    observers: Sequence[Observer], opened: Callable[[RunFolder], None]
) -> ServerApp:
    """Return a ServerApp that also tells `observers`, and `opened` the run folder."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run(grid, context, observers, opened)

    return app


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run in a process of Flower's, as `flwr run` and a SuperLink start it."""
    try:
        folder = run(grid, context, [LogLines()], _opened)
    except (ConfigError, NotWritten, RoundFailed) as error:
        # Flower logs a traceback of all that is raised; what a user can mend is said in one line. It is
        # raised all the same: only then does Flower's list of runs say that this one failed.
        logging.getLogger("flwr").addFilter(_InOneLine(error))
        raise
    log(INFO, "pictures, tables and model: %s", folder)


def _opened(folder: RunFolder) -> None:
    # `flwr stop` reaches this process as a signal, while the ServerApp works in another thread.
    add_exit_handler(folder.stop)
    # Where that is depends on where the SuperLink was started, unless run.dir is an absolute path.
    log(INFO, "run folder: %s", folder.path)


class _InOneLine(logging.Filter):
    """Shows an error in one line of Flower's log, without the traceback and the exit code."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.exc_info, tuple) and record.exc_info[1] is self._error:
            record.msg, record.args, record.exc_info = f"error: {self._error}", (), None
        return not record.getMessage().startswith("Exit Code:")
