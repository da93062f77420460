"""The engines that run both apps on one machine: in this process, or in Flower's Ray simulation."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, repeat
from logging import DEBUG
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal
from uuid import uuid4

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from layerfed.client.workbench import Workbench, workbench
from layerfed.client_app import build_client_app, client_app
from layerfed.config import ConfigError, Flat, RunConfig, Scalar
from layerfed.flower_compat import (
    SUPERLINK_NODE_ID,
    ErrorCode,
    Run,
    empty_run,
    enter_run,
    stamp,
    without_deprecation,
)
from layerfed.runs import RunFolder
from layerfed.runs.records import Observer
from layerfed.server_app import build_account, build_server_app, build_strategy

__all__ = ["Engine", "EngineName", "InProcessGrid", "choose_engine", "prepare", "run_on"]

Engine = Literal["inprocess", "ray"]
EngineName = Literal["auto", "inprocess", "ray"]

# Ray takes about ten seconds to start and ten milliseconds a message. For a smaller model, clients that
# work in parallel never save as much time.
SMALL_MODEL = 20_000_000


# Server and clients of one process share arrays by reference.
HERE = {"store": "memory"}


class InProcessGrid(Grid):
    """A Grid whose nodes are this process: clients work one after another, without serialisation.

    A client works when its reply is pulled, so there is never more than one reply in memory.

    Parameters
    ----------
    client_app : flwr.clientapp.ClientApp
    num_supernodes : int
        The number of clients; node i holds partition i.
    run_config : Flat
        The run configuration in each client's context.
    nodes : Sequence[Mapping[str, Scalar]] (default: ())
        More settings for the first nodes, one entry for each, as in `flower-supernode --node-config`.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_supernodes: int,
        run_config: Flat,
        nodes: Sequence[Mapping[str, Scalar]] = (),
    ) -> None:
        enter_run()
        self._app = client_app
        self._run = empty_run()
        self._contexts = {
            SUPERLINK_NODE_ID + 1 + i: Context(
                run_id=1,
                node_id=SUPERLINK_NODE_ID + 1 + i,
                node_config={
                    "partition-id": i,
                    "num-partitions": num_supernodes,
                    **HERE,
                    **settings,
                },
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for i, settings in zip(range(num_supernodes), chain(nodes, repeat({})), strict=False)
        }
        self._queue: deque[Message] = deque()

    def set_run(self, run: Run) -> None:
        """Set the run this grid operates in."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid operates in."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message (Flower's deprecated way; use `Message`)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; return their ids."""
        identities = []
        for message in messages:
            identity = str(uuid4())
            stamp(message, message_id=identity)
            self._queue.append(message)
            identities.append(identity)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let the next asked client work and return its reply."""
        wanted = set(message_ids)
        for position, message in enumerate(self._queue):
            if message.metadata.message_id in wanted:
                del self._queue[position]
                return [self._work(message)]
        return []

    def withdraw(self, message_ids: Iterable[str]) -> None:
        """Withdraw messages that no client has worked on yet."""
        unwanted = set(message_ids)
        self._queue = deque(m for m in self._queue if m.metadata.message_id not in unwanted)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Let all asked clients work and return their replies."""
        wanted = list(self.push_messages(messages))
        return [reply for identity in wanted for reply in self.pull_messages([identity])]

    def _work(self, message: Message) -> Message:
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # every error of a client becomes that client's reply
            log(DEBUG, "a client raised", exc_info=error)
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def choose_engine(config: RunConfig, engine: EngineName) -> tuple[Engine, str]:
    """Return the engine, with `auto` resolved, and the reason for it."""
    if engine != "auto":
        return engine, "as asked"
    elements = sum(x.elements for x in workbench(config.to_flat()).resident.layers.layers)
    abreast = min(config.federation.cohort, _clients_abreast(config))
    if elements < SMALL_MODEL:
        return "inprocess", f"a model of {elements / 1e6:.1f} M parameters is faster without Ray"
    if abreast < 2:
        return "inprocess", "there is room for one client at a time"
    return "ray", f"{abreast} clients at a time"


def _clients_abreast(config: RunConfig) -> int:
    cores = int((os.cpu_count() or 1) / config.run.client_cpus)
    if _gpu_share(config) > 0:
        return min(cores, int(torch.cuda.device_count() / config.run.client_gpus))
    return cores


def _gpu_share(config: RunConfig) -> float:
    """Return the share of a GPU that each client gets; 0 if the run is on the CPU."""
    on_gpu = config.run.device == "auto" or config.run.device.startswith("cuda")
    return config.run.client_gpus if on_gpu and torch.cuda.is_available() else 0.0


def prepare(config: RunConfig) -> Workbench:
    """Load a configuration's data and model, and build its strategy, as a run on this machine would.

    Raises
    ------
    ConfigError
        If the configuration cannot be run here.
    """
    config = config.simulated()
    bench = workbench(config.to_flat())
    build_account(config, build_strategy(config, bench.resident.layers))
    bench.loss(0)
    return bench


def run_on(
    engine: Engine,
    config: RunConfig,
    observers: Sequence[Observer] = (),
    *,
    nodes: Sequence[Mapping[str, Scalar]] = (),
    verbose: bool = False,
    opened: Callable[[RunFolder], None] = lambda folder: None,
) -> Path:
    """Run a configuration on one machine and return the run folder.

    Parameters
    ----------
    engine : {"inprocess", "ray"}
    config : RunConfig
    observers : Sequence[Observer] (default: ())
    nodes : Sequence[Mapping[str, Scalar]] (default: ())
        Own settings of the in-process engine's nodes, such as a budget for each.
    verbose : bool (default: False)
        Whether to show Ray's own log.
    opened : Callable[[RunFolder], None]
        Called with the run folder once it exists, before the first round.

    Raises
    ------
    ConfigError
        If the configuration cannot be run. Nothing is written then, and no client has worked.
    RoundFailed
        If too few clients took part.
    """
    config = config.simulated()
    flat = config.to_flat()
    # Built here first, so that impossible settings are refused before Ray starts, which takes seconds.
    bench = prepare(config)
    if nodes and engine != "inprocess":
        raise ConfigError(
            f"settings of nodes are for the in-process engine; Flower's {engine} sets its nodes' own"
        )
    folders: list[RunFolder] = []

    def remember(folder: RunFolder) -> None:
        folders.append(folder)
        opened(folder)

    server = build_server_app(observers, remember)
    if engine == "inprocess":
        grid = InProcessGrid(client_app, config.federation.clients, flat, nodes)
        context = Context(
            run_id=1,
            node_id=SUPERLINK_NODE_ID,
            node_config=dict(HERE),
            state=RecordDict(),
            run_config=flat,
        )
        server(grid, context)
    else:
        cores = os.cpu_count() or 1
        if config.run.client_cpus > cores:
            raise ConfigError(
                f"run.client-cpus = {config.run.client_cpus:g}, but this machine has {cores}: no "
                "client could ever run"
            )
        # By default this run gets a store of its own, for the present version and the one before.
        bytes_ = sum(layer.bytes for layer in bench.resident.layers.layers)
        with TemporaryDirectory(prefix="layerfed-", ignore_cleanup_errors=True) as folder:
            own: Flat = {"store": folder, "store-size": 3e-9 * bytes_}
            try:
                _run_ray(server, config, flat, {} if config.exchange.store else own, verbose)
            except (KeyboardInterrupt, SystemExit):  # Ray takes SIGTERM and raises SystemExit
                for entered in folders:
                    entered.stop("interrupted")
                raise KeyboardInterrupt from None
    return folders[0].path


@without_deprecation()
def _run_ray(server: ServerApp, config: RunConfig, flat: Flat, node: Flat, verbose: bool) -> None:
    # Imported late: Ray takes seconds to import, and the in-process engine does not need it.
    import ray
    from flwr.simulation import run_simulation

    def configured(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        # Outside `flwr run`, Flower gives clients an empty run configuration, and its context must not
        # change. So the client gets another context with the same state.
        mine = Context(
            run_id=context.run_id,
            node_id=context.node_id,
            node_config={**context.node_config, **node},
            state=context.state,
            run_config=dict(flat),
        )
        return call_next(message, mine)

    wrapped, stopped = ServerApp(), threading.Event()

    @wrapped.main()
    def main(grid: Grid, context: Context) -> None:
        pull = grid.pull_messages

        def pull_unless_stopped(message_ids: Iterable[str]) -> Iterable[Message]:
            if stopped.is_set():
                sys.exit()  # ends this thread, which would otherwise wait for clients that are gone
            return pull(message_ids)

        grid.pull_messages = pull_unless_stopped  # type: ignore[method-assign]
        context.run_config, context.node_config = dict(flat), dict(node)
        server(grid, context)

    handler = signal.getsignal(signal.SIGTERM)
    try:
        # Started here and not by Flower, because Ray installs its own SIGTERM handler, which ends the
        # process.
        ray.init(
            include_dashboard=False,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
            logging_level=logging.INFO if verbose else logging.ERROR,
            log_to_driver=verbose,
        )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
        run_simulation(
            server_app=wrapped,
            client_app=build_client_app([configured]),
            num_supernodes=config.federation.clients,
            backend_config={
                "client_resources": {
                    "num_cpus": config.run.client_cpus,
                    "num_gpus": _gpu_share(config),
                }
            },
        )
    finally:
        stopped.set()
        ray.shutdown()
