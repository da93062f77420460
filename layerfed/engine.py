"""The engines that run both apps on one machine: in this process, or with clients in actors of Ray."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from flwr.app import Context, RecordDict

from layerfed.client.limits import free_memory
from layerfed.client.workbench import Workbench, workbench
from layerfed.client_app import client_app
from layerfed.config import ConfigError, RunConfig, Scalar
from layerfed.config.errors import MissingExtra
from layerfed.flower_compat import SUPERLINK_NODE_ID
from layerfed.grids.inprocess import HERE, InProcessGrid
from layerfed.grids.ray import Actors, RayGrid
from layerfed.runs import RunFolder
from layerfed.runs.records import Observer
from layerfed.runs.trackers import load_trackers
from layerfed.server_app import build_account, build_server_app, build_strategy

__all__ = [
    "Engine",
    "EngineName",
    "InProcessGrid",
    "Outlook",
    "choose_engine",
    "outlook",
    "prepare",
    "run_on",
]

Engine = Literal["inprocess", "ray"]
EngineName = Literal["auto", "inprocess", "ray"]

# Seconds that clients who work side by side must save before `auto` starts Ray. Ray starts in the
# background, which costs little; its end and the first work of each actor take a few seconds.
WORTH_SECONDS = 10.0


def choose_engine(config: RunConfig, engine: EngineName) -> tuple[Engine, str]:
    """Return the engine, with `auto` resolved, and the reason for it.

    `auto` measures the seconds and the memory of the first client's training step, and compares the work
    of the whole run with what the machine's cores and free memory allow side by side.
    """
    if engine != "auto":
        return engine, "as asked"
    if config.run.ray_address:
        return "ray", f"the cluster at {config.run.ray_address}"
    if find_spec("ray") is None:
        return "inprocess", "Ray is not installed"
    ahead = outlook(config)
    if ahead.abreast < 2:
        return "inprocess", "there is room for one client at a time"
    work = ahead.round_seconds * config.federation.rounds
    if work * (1 - 1 / ahead.abreast) < WORTH_SECONDS:
        return "inprocess", f"{work:.0f} s of clients' work are not worth starting Ray"
    return "ray", f"{ahead.abreast} clients at a time, for about {work:.0f} s of work"


@dataclass(frozen=True)
class Outlook:
    """What a run's clients take here, by the measured step of the first one on all blocks.

    Attributes
    ----------
    needed : float
        Bytes of a client on its device; infinity if not even one fits.
    step_seconds : float
    round_seconds : float
        Steps and probes of all clients of a round, one after another.
    abreast : int
        Clients that fit at a time; 1 if Ray is not installed, 0 if not even one does.
    """

    needed: float
    step_seconds: float
    round_seconds: float
    abreast: int


def outlook(config: RunConfig) -> Outlook:
    """Measure the first client's training step, once a process, and work out a round."""
    bench = workbench(config.to_flat())
    needed, seconds = bench.first_step
    steps = config.train.steps(len(bench.examples(0)[0])) + config.strategy.probe_batches
    abreast = _actors(config, bench, needed).count
    if find_spec("ray") is None:
        abreast = min(abreast, 1)
    return Outlook(needed, seconds, seconds * steps * config.federation.cohort, abreast)


def _actors(config: RunConfig, bench: Workbench, needed: float) -> Actors:
    """Return as many actors as cores and free memory allow, at most one for each client of a round.

    Parameters
    ----------
    config : RunConfig
    bench : Workbench
    needed : float
        Bytes that a client needs on its device.
    """
    section = config.run
    count = min(config.federation.cohort, int((os.cpu_count() or 1) / section.client_cpus))
    gpus = 0.0
    try:
        room = math.floor(free_memory(bench.device) / needed) if math.isfinite(needed) else 0
    except ConfigError:  # the system does not say; its owner chose the engine
        room = count
    if bench.device.type == "cuda":
        cards = 1 if ":" in section.device else torch.cuda.device_count()
        # Ray takes whole GPUs, or equal shares of one.
        gpus = section.client_gpus or 1 / max(room, 1)
        if section.client_gpus:
            room = cards * math.floor(1 / gpus + 1e-9) if gpus <= 1 else math.floor(cards / gpus)
        else:
            room *= cards
    return Actors(
        # Of a cluster the grid learns the resources, which are the limit there.
        count=config.federation.cohort if section.ray_address else min(count, room),
        cpus=section.client_cpus,
        gpus=gpus,
        address=section.ray_address,
        device=section.device,
    )


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
    load_trackers(config)
    bench.loss(0)
    for client in range(config.federation.clients):
        bench.examples(client)  # refuses a client without examples to train on
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
        Own settings of the first nodes, such as a budget for each.
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
    # Built here first, so that impossible settings are refused before Ray starts.
    bench = prepare(config)
    folders: list[RunFolder] = []

    def remember(folder: RunFolder) -> None:
        folders.append(folder)
        opened(folder)

    server = build_server_app(observers, remember)
    context = Context(
        run_id=1,
        node_id=SUPERLINK_NODE_ID,
        node_config=dict(HERE),
        state=RecordDict(),
        run_config=flat,
    )
    clients = config.federation.clients
    if engine == "inprocess":
        server(InProcessGrid(client_app, clients, flat, nodes), context)
    else:
        with RayGrid(_checked_actors(config, bench, verbose), clients, flat, nodes) as grid:
            server(grid, context)
    return folders[0].path


def _checked_actors(config: RunConfig, bench: Workbench, verbose: bool) -> Actors:
    """Return the actors of a run on Ray.

    Raises
    ------
    ConfigError
        If Ray is not installed, or no client fits this machine.
    """
    if find_spec("ray") is None:
        raise MissingExtra(
            '--engine ray needs ray: pip install ".[simulation]" in the clone of LayerFed'
        )
    needed, _ = bench.first_step
    actors = _actors(config, bench, needed)
    cores = os.cpu_count() or 1
    if not actors.address and actors.cpus > cores:
        raise ConfigError(
            f"run.client-cpus = {actors.cpus:g}, but this machine has {cores}: no client could ever run"
        )
    if not actors.count:
        free = free_memory(bench.device) / 1e9
        raise ConfigError(
            f"a client needs {needed / 1e9:.1f} GB on {bench.device}, and {free:.1f} GB are free beside "
            "this process; use --engine inprocess, or a smaller train.batch-size"
        )
    return replace(actors, verbose=verbose)
