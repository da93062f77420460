"""The ServerApp: it reads the configuration, builds and runs the strategy, and closes the run folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from io import StringIO
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from layerfed.client.flops import forward_flops
from layerfed.client.objective import objective
from layerfed.client.statistics import load_statistic, of_data
from layerfed.client.workbench import Workbench, node_store, workbench
from layerfed.config import ConfigError, RunConfig
from layerfed.config.errors import EXPECTED
from layerfed.exchange import LayerStore, MemoryStore
from layerfed.exchange.codecs import codec_of
from layerfed.exchange.scores import ACCURACY, LOSS
from layerfed.flower_compat import add_exit_handler, engine_of, in_one_line
from layerfed.models.layers import LayerMap, layer_costs
from layerfed.privacy.account import PrivacyAccount
from layerfed.privacy.protection import refuse_buffers
from layerfed.report import PAGE, data_table, draw_run, run_view, write_page
from layerfed.runs import (
    BestModel,
    Checkpoint,
    Checkpoints,
    LogLines,
    RunFolder,
    latest_checkpoint,
    lock,
    restore_best,
)
from layerfed.runs.files import read_json
from layerfed.runs.records import Observer
from layerfed.runs.trackers import load_trackers
from layerfed.server.aggregation import Aggregation
from layerfed.server.budgets import Budgets
from layerfed.server.optimizers import SERVER_OPTIMIZERS
from layerfed.server.population import federation_size
from layerfed.server.private import Accounting, CentralNoise
from layerfed.server.resuming import check_base, check_data
from layerfed.server.secure_sums import SecureSums
from layerfed.server.skipping import Skipping
from layerfed.server.steps import CappedWeights, Clipping, Decoding, ServerStep
from layerfed.strategies import (
    RoundSettings,
    SelectiveStrategy,
    checked,
    option_defaults,
    options_of,
)
from layerfed.task import Examples, Task
from layerfed.task.overview import describe_data
from layerfed.task.scoring import Evaluation, evaluate_task

__all__ = ["build_account", "build_server_app", "build_strategy", "run", "server_app"]


def build_strategy(
    config: RunConfig,
    layers: LayerMap,
    store: LayerStore | None = None,
    task: Task | None = None,
) -> SelectiveStrategy:
    """Build the strategy that a configuration names, for a model of these layers.

    Clients that read the same layer store as the server are sent no layers. The task says what models
    are scored by; without one it is accuracy and loss.

    Raises
    ------
    ConfigError
        If budgets, strategy or privacy do not fit the model.
    """
    if config.privacy.mode != "none":
        refuse_buffers(layers)
    section, server = config.strategy, config.server
    strategy, options = options_of(config)
    costs = layer_costs(layers, config.budget.unit)
    built = strategy(
        layers,
        budget=Budgets(
            config.budget,
            costs,
            config.run.seed,
            kept=strategy.within_budget,
            least=partial(strategy.least, layers=layers),
        ),
        settings=RoundSettings(
            clients_per_round=config.federation.cohort,
            clients=config.federation.population,
            min_replies=config.federation.needed_replies,
            over_provision=config.federation.over_provision,
            lr_factor=partial(config.train.factor, rounds=config.federation.rounds),
            server_lr_factor=partial(server.factor, rounds=config.federation.rounds),
            local_steps=config.train.steps,
            probe_batches=section.probe_batches,
            probe_examples=section.probe_examples,
            probe=section.probe,
            probe_share=section.probe_share,
            period=section.period,
            theory=section.theory,
            client_evaluation=config.task.local_test > 0,
            codec=config.exchange.codec,
            downlink_codec=config.exchange.downlink_codec,
            deadline=config.federation.deadline,
            skip=Skipping.of(config.train, layers),
            steps=_steps(config),
            aggregation=Aggregation(
                server.aggregation,
                server.trim,
                config.model.lora_alpha / config.model.lora_rank,
                config.run.seed,
                server.average_over,
            ),
            scores=task.scores if task else (ACCURACY, LOSS),
            metric=task.metric if task else ACCURACY,
            seed=config.run.seed,
        ),
        optimizer=SERVER_OPTIMIZERS[server.optimizer](
            server.lr, server.momentum, server.beta2, server.tau
        ),
        store=store,
        **options.model_dump(),
    )
    for name in built.statistics:
        load_statistic(name)
    return built


def _steps(config: RunConfig) -> tuple[ServerStep, ...]:
    """Return the steps of updates on the server, in order."""
    privacy = config.privacy
    steps: list[ServerStep] = [SecureSums(config.secagg) if config.secagg.enabled else Decoding()]
    if config.server.clip:
        steps.append(Clipping(config.server.clip))
    if config.federation.max_examples:
        steps.append(CappedWeights(config.federation.max_examples))
    if privacy.mode == "central":
        steps.append(CentralNoise(privacy.clip, privacy.noise))
    return tuple(steps)


def build_account(config: RunConfig, strategy: SelectiveStrategy) -> PrivacyAccount | None:
    """Return the run's privacy account, or None if the run promises no privacy.

    Raises
    ------
    ConfigError
        If the accountant is not installed.
    """
    if config.privacy.mode == "none":
        return None

    def covered(server_round: int) -> list[str]:
        at_global = config.strategy.probe == "before"
        return of_data(strategy.probed_in(server_round), strategy.layers, at_global=at_global)

    return PrivacyAccount(config.privacy, covered, config.federation.rounds)


def run(
    grid: Grid,
    context: Context,
    observers: Sequence[Observer],
    opened: Callable[[RunFolder], None],
) -> Path:
    """Run the context's run configuration; return the run folder.

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
        If the configuration cannot be run. Nothing is written then, and no client has worked.
    RoundFailed
        If too few clients took part. The run folder says so too.
    NotWritten
        If the run folder cannot be written any more. Its content is whole, and the run can be resumed.
    """
    config = RunConfig.from_flat(context.run_config)
    # The folder is locked before its checkpoint is read: another process may still write it.
    held = lock(Path(config.run.resume)) if config.run.resume else None
    try:
        with ExitStack() as ending:
            return _run(config, grid, context, observers, opened, ending)
    finally:
        if held is not None:
            held.release()


def _run(
    config: RunConfig,
    grid: Grid,
    context: Context,
    observers: Sequence[Observer],
    opened: Callable[[RunFolder], None],
    ending: ExitStack,
) -> Path:
    trackers = load_trackers(config)  # refused before anything is written
    bench = workbench(context.run_config)
    test, data = bench.task.test_examples(), bench.task.fingerprint()
    _refuse_unusable(bench.task, test)
    if not config.federation.clients:
        config = config.of_size(federation_size(grid, config.federation.timeout))
    config = checked(config)
    objective(bench.task, bench.resident.model, test)  # refuses what does not fit the task
    strategy = build_strategy(config, bench.resident.layers, node_store(context), bench.task)
    account = build_account(config, strategy)
    resumed = _to_resume(config, bench, data)
    if resumed is not None:
        strategy.resume(resumed)
        if codec_of(config.exchange.codec, bench.resident.layers).feedback and isinstance(
            node_store(context), MemoryStore
        ):
            log(
                WARNING,
                "exchange.codec = '%s': clients of a simulation remember their coding errors in memory "
                "only, so the run ends a little different from one without a break",
                config.exchange.codec,
            )
    strategy.observers = tuple(observers)
    strategy.connect(grid, config.federation.timeout)
    engine = engine_of(grid)
    if resumed is None:
        entered = RunFolder.create(config, engine, data)
    else:
        defaults = option_defaults(config.strategy.name)
        entered = RunFolder.reopen(
            Path(config.run.resume), config, engine, resumed.round, defaults, data
        )
        restore_best(Path(config.run.resume), resumed.round)
    evaluations: dict[int, Evaluation] = {}
    with _page_of(entered.path), entered as folder:
        folder.describe_data(_data(config, bench.task, engine))
        opened(folder)
        observers = (*observers, *(build(folder.path, config) for build in trackers))
        ending.callback(_end, folder.path, observers)
        bench.task.keep(folder.path)
        for observer in observers:
            observer.on_inputs(bench.task.summary())
        example = next(iter(test.in_order(1, bench.device)))
        flops = forward_flops(bench.resident.model, strategy.layers, example, bench.task.logits)
        folder.describe(bench.resident.base, strategy.layers, *flops)
        best = BestModel(
            folder.path,
            bench.resident.base,
            lambda: strategy.model.changed_tensors,
            bench.task.metric,
        )
        strategy.observers = (folder, best, *observers)
        if account is not None:
            account.recall(folder.asked(), folder.repeated_rounds)
            account.announce()
            strategy.add_step(Accounting(account))
        if every := config.run.checkpoint_every:
            kept = Checkpoints(
                folder.path,
                lambda: replace(strategy.checkpoint(), data=data),
                every,
                config.run.checkpoints,
            )
            strategy.observers += (kept,)
        strategy.start(
            grid,
            bench.resident.base_arrays(),
            num_rounds=config.federation.rounds,
            timeout=config.federation.timeout,
            train_config=ConfigRecord({"lr": config.train.lr}),
            evaluate_fn=_evaluation(config, strategy, bench, test, evaluations),
            should_stop=lambda: best.stalled(config.federation.patience),
        )
        if evaluations:
            folder.describe_result(_result(bench.task, *evaluations.popitem()))
        elif strategy.layers.kept and config.task.local_test:
            record = strategy.round.record
            folder.describe_result({"round": record.round, "scores": record.scores})
        folder.finish(bench.resident.base, strategy.model.changed_tensors)
    try:
        # `layerfed report` draws the forms that take longer.
        draw_run(folder.path, ["png"])
    except (OSError, ValueError) as error:
        log(WARNING, "no pictures: %s; `layerfed report %s` draws them", error, folder.path)
    return folder.path


@contextmanager
def _page_of(folder: Path) -> Iterator[None]:
    """Write the run's page at its end, also that of a run that failed or was stopped."""
    try:
        yield
    finally:
        _write_page(folder)


def _write_page(folder: Path) -> None:
    try:
        write_page(run_view(folder), folder / PAGE)
    except Exception as error:
        # No page is worth a run. In Flower's bundle the page's script comes from the installed package.
        log(WARNING, "no page: %s; `layerfed report %s` writes it", error, folder)


def _end(folder: Path, observers: Sequence[Observer]) -> None:
    """Tell observers that a run is over, with the status in its folder."""
    status = read_json(folder / "summary.json")["status"]
    for observer in observers:
        try:
            observer.on_close(status)
        except Exception as error:  # the run is over, and others are told still
            log(WARNING, "%s: %s", type(observer).__name__, error)


def _to_resume(config: RunConfig, bench: Workbench, data: str) -> Checkpoint | None:
    """Return the checkpoint that a run continues from; None for a new run."""
    if not config.run.resume:
        return None
    found = latest_checkpoint(Path(config.run.resume))
    if found is None:
        raise ConfigError(
            f"run.resume = '{config.run.resume}' holds no checkpoint that can be used; start the run "
            "from the beginning, under another run.name"
        )
    check_base(found, bench.resident.base)
    check_data(found, data, f"task.data = '{config.task.data}'")
    return found


def _refuse_unusable(task: Task, test: object) -> None:
    """Refuse what would go wrong in an evaluation or in a picture at the end."""
    name = f"task.name = '{task.config.task.name}'"
    if not isinstance(test, Examples) or not len(test):
        given = test if isinstance(test, Examples) else type(test).__name__
        raise ConfigError(
            f"{name} has no test set: test_examples() should return Examples, one at least; it returns "
            f"{given}"
        )
    for kind, names in (("classes", task.classes), ("groups", task.groups)):
        if len(set(names)) < len(names) or not all(isinstance(each, str) for each in names):
            raise ConfigError(
                f"{name}: its {kind} should be texts of which no two are equal; they are "
                f"{', '.join(map(repr, names[:9]))}"
            )


def _data(config: RunConfig, task: Task, engine: str) -> dict[str, Any]:
    """Return who holds how many examples of what.

    The clients' part is empty on real devices, which may hold data of their own, and if the run promises
    that the server does not learn of single clients' examples.
    """
    private = config.privacy.mode != "none" or config.secagg.enabled
    known = engine != "superlink" and not private
    return describe_data(task, config.federation.population if known else 0)


def _result(task: Task, number: int, evaluation: Evaluation) -> dict[str, Any]:
    """Return what is reported of the final model on the test set."""
    groups = {name: finite(scores) for name, scores in evaluation.groups.items()}
    details = evaluation.tally.details(task.classes) | ({"groups": groups} if groups else {})
    return {"round": number, "scores": finite(evaluation.scores), **details}


def finite(scores: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return scores with None for those that are not finite, which JSON has no word for."""
    return {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in scores.items()
    }


def _evaluation(
    config: RunConfig,
    strategy: SelectiveStrategy,
    bench: Workbench,
    test: Examples,
    found: dict[int, Evaluation],
) -> Callable[[int, ArrayRecord], MetricRecord | None]:
    """Return a function that evaluates the global model on the server's test set.

    `found` has the last evaluation by its round.
    """

    def evaluate_globally(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round % config.run.evaluate_every and server_round != config.federation.rounds:
            return None
        # From the strategy's own tensors, so that only changed layers are copied to the device.
        bench.resident.move_to(strategy.model.manifest(), strategy.model.tensors)
        evaluation = evaluate_task(
            *(bench.task, bench.resident.model, test),
            config.run.evaluate_batch or bench.evaluation_rows,
            bench.device,
            by_group=True,
            logits=bench.logits,
        )
        found.clear()
        found[server_round] = evaluation
        groups = {name: finite(scores) for name, scores in evaluation.groups.items()}
        strategy.round.record.groups = groups
        known = finite(evaluation.scores)
        return MetricRecord({name: float(v) for name, v in known.items() if v is not None})

    return evaluate_globally


def build_server_app(
    observers: Sequence[Observer], opened: Callable[[RunFolder], None]
) -> ServerApp:
    """Return a ServerApp with observers; it calls `opened` with the run folder."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run(grid, context, observers, opened)

    return app


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run in Flower's own process, which `flwr run` or a SuperLink started."""
    try:
        folder = run(grid, context, [LogLines()], _opened)
    except EXPECTED as error:
        in_one_line(error)
        raise
    log(INFO, "pictures, tables and model: %s", folder)


def _opened(folder: RunFolder) -> None:
    # `flwr stop` reaches this process as a signal, while the ServerApp works in another thread.
    add_exit_handler(folder.stop)
    # Unless run.dir is absolute, the path depends on the folder in which the SuperLink was started.
    log(INFO, "run folder: %s", folder.path)
    table = StringIO()
    Console(file=table, width=160, emoji=False).print(
        data_table(read_json(folder.path / "data.json"))
    )
    for line in table.getvalue().splitlines():
        log(INFO, "%s", line.rstrip())
