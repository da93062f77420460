"""The ClientApp: one client's side of a round.

`client_app` is what Flower loads; `build_client_app` makes another with mods of your own (differential
privacy, compression, …). All state between messages is the resident workbench: task, model and
optimiser settings, built once per process and configuration.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import cast

import numpy as np
import torch
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from layerfed.client.costs import (
    MEASURED_UNITS,
    MeasuredUnit,
    measure_costs,
    step_cost,
)
from layerfed.client.limits import (
    Allowance,
    LayerCosts,
    free_memory,
    paced,
)
from layerfed.client.local_sgd import LocalSGD
from layerfed.client.probe import probe_layers
from layerfed.client.resident import ResidentModel, keeping_layers
from layerfed.client.training import OptimizerFn, evaluate, train_update
from layerfed.config import (
    BudgetUnit,
    ConfigError,
    Flat,
    NodeConfig,
    RunConfig,
    Scalar,
    TrainConfig,
)
from layerfed.exchange import (
    CODECS,
    WRONG_SETTINGS,
    Description,
    LayerStore,
    compress,
    describe_reply,
    evaluate_reply,
    open_store,
    probe_reply,
    read_config,
    read_manifest,
    read_mask,
    read_schedule,
    read_upload,
    train_reply,
)
from layerfed.exchange.change_score import change_score, highest
from layerfed.models.layers import LayerMap, layer_costs
from layerfed.privacy.protection import Protection, refuse_buffers
from layerfed.secure.client import add_secure_sums, masking
from layerfed.secure.messages import read_secure
from layerfed.seeding import Stream, generator, torch_seed
from layerfed.task import Batch, Examples, Task, load_task

__all__ = ["Workbench", "build_client_app", "client_app", "node_store", "workbench"]


class Workbench:
    """What a process keeps between messages: the task's data and one resident model."""

    def __init__(self, config: RunConfig, *, own_data: bool = False) -> None:
        self.config = config
        self.task: Task = load_task(config)
        self.task.own_data = own_data
        self.device = _device(config.run.device)
        self.resident = ResidentModel(self.task.build_model, self.task.layers, self.device)
        self._examples: dict[int, tuple[Examples, Examples]] = {}
        self._costs: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}

    def examples(self, partition: int) -> tuple[Examples, Examples]:
        """Return a client's training and held-out examples."""
        if partition not in self._examples:
            self._examples[partition] = self.task.client_examples(partition)
        return self._examples[partition]

    def costs(self, partition: int, unit: MeasuredUnit) -> tuple[np.ndarray, np.ndarray]:
        """Return c_l and D_l as measured on this device, shape (L,) each; once a batch size."""
        batch = self._batch(partition)
        key = unit, len(next(iter(batch.values())))
        if key not in self._costs:
            self._costs[key] = measure_costs(
                self.resident.model,
                self.resident.layers,
                batch,
                self.task.loss,
                unit,
                precision=self.config.train.precision,
            )
        return self._costs[key]

    def head_memory(self, partition: int) -> float:
        """Return the bytes that a step of training the head alone takes on this device."""
        return step_cost(
            self.resident.model,
            self.resident.layers,
            [],
            self._batch(partition),
            self.task.loss,
            "memory",
            precision=self.config.train.precision,
        )

    def _batch(self, partition: int) -> Batch:
        size = self.config.train.batch_size
        return next(self.examples(partition)[0].in_order(size, self.device))


@lru_cache(maxsize=64)
def _parsed(items: tuple[tuple[str, type, Scalar], ...]) -> RunConfig:
    return RunConfig.from_flat({key: value for key, _, value in items})


def _run_config(flat: Flat) -> RunConfig:
    """Return a run configuration, checked once a process: every message brings the same."""
    # With types, or True would be found where 1 was checked.
    return _parsed(tuple([(key, type(value), value) for key, value in flat.items()]))


@lru_cache(maxsize=2)
def _workbench(config: RunConfig, own_data: bool) -> Workbench:
    return Workbench(config, own_data=own_data)


def workbench(flat: Flat, node: NodeConfig | None = None) -> Workbench:
    """Return the process's workbench for a run configuration, and a node's own settings.

    Runs that differ only in strategy, budget or the run's name share one, so a sweep in one process
    loads data and model once.
    """
    config = _run_config(flat)
    if node is not None:
        config = node.applied_to(config)
    defaults = RunConfig()
    shared = config.model_copy(
        update={
            "strategy": defaults.strategy,
            "budget": defaults.budget,
            "server": defaults.server,
            "exchange": defaults.exchange,
            "privacy": defaults.privacy,
            "secagg": defaults.secagg,
            "run": defaults.run.model_copy(
                update={"seed": config.run.seed, "device": config.run.device}
            ),
        }
    )
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    return _workbench(shared, node is not None and node.own_data is not None)


def _device(name: str) -> torch.device:
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"run.device = '{name}', but there is no CUDA device; use auto or cpu")
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _optimizer(train: TrainConfig, lr: float) -> OptimizerFn:
    """Return what builds the local optimiser from the parameters to train."""
    if train.optimizer == "adamw":
        return lambda parameters: torch.optim.AdamW(
            parameters, lr=lr, weight_decay=train.weight_decay
        )
    return lambda parameters: LocalSGD(parameters, lr, train.momentum, train.weight_decay)


def _forget_peak_memory(device: torch.device) -> None:
    """Begin a new peak where a device can: a process elsewhere keeps its own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> float:
    """Return peak bytes: of tensors on a GPU, of the whole process elsewhere."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def node_store(context: Context) -> LayerStore:
    """Return the layer store of a node, or of the server: its own setting, or else the run's."""
    section = _run_config(context.run_config).exchange
    store = context.node_config.get("store") or section.store
    size = context.node_config.get("store-size") or section.store_size
    return open_store(str(store), float(cast(float, size)))


def _protection(node: NodeConfig, context: Context) -> Protection | None:
    """Return what this node does to all that it sends."""
    return Protection.of(_run_config(context.run_config).privacy, node)


def _stated(examples: int, protection: Protection | None) -> int:
    """Return the number of examples that a client states: the same for all where that is private."""
    return 1 if protection is not None and protection.hides_examples else examples


def _allowance(
    node: NodeConfig, bench: Workbench, context: Context, *, anew: bool = False
) -> Allowance | None:
    """Return what this node affords in the run: worked out once, or `anew`."""
    # The workbench does not know the budget's unit: runs that differ in it share one.
    unit = _run_config(context.run_config).budget.unit
    if not anew and (known := Allowance.recall(context.state, unit)) is not None:
        return known

    def costs(unit: BudgetUnit) -> LayerCosts:
        same = layer_costs(bench.resident.layers, unit)
        if same is not None:
            return LayerCosts(same, np.zeros_like(same))
        return LayerCosts(*bench.costs(node.partition_id, cast(MeasuredUnit, unit)))

    found = Allowance.of(
        node,
        unit,
        costs,
        free=lambda: free_memory(bench.device),
        head=lambda: bench.head_memory(node.partition_id),
    )
    if found is not None:
        found.remember(context.state)
    return found


def describe(message: Message, context: Context) -> Message:
    """Say which partition this node holds, how many examples, and what it can afford."""
    try:
        return describe_reply(message, _description(context))
    except ConfigError as error:
        # As a reply, not raised: Flower would log a traceback for each client.
        return Message(Error(WRONG_SETTINGS, str(error)), reply_to=message)


def _description(context: Context) -> Description:
    node = NodeConfig.read(context.node_config)
    bench = workbench(context.run_config, node)
    # A partition that is not there is refused by the server, in words a user can act on.
    clients = bench.config.federation.clients
    exists = not clients or node.partition_id < clients
    unit = _run_config(context.run_config).budget.unit
    costs = depth_costs = allowance = None
    if exists:
        allowance = _allowance(node, bench, context, anew=True)
        if unit in MEASURED_UNITS:
            costs, depth_costs = (tuple(x) for x in bench.costs(node.partition_id, unit))
    count = len(bench.examples(node.partition_id)[0]) if exists else 1
    return Description(
        partition=node.partition_id,
        examples=_stated(count, _protection(node, context)),
        budget=None if allowance is None else allowance.budget,
        partitions=node.num_partitions,
        costs=costs,
        depth_costs=depth_costs,
    )


def probe(message: Message, context: Context) -> Message:
    """Measure each layer's gradient at θ^t on this client's data."""
    node = NodeConfig.read(context.node_config)
    bench = workbench(context.run_config, node)
    config = read_config(message)
    partition, resident, train = node.partition_id, bench.resident, bench.config.train
    resident.move_to(*read_manifest(message), node_store(context))
    examples, _ = bench.examples(partition)
    count = config["batches"] or -(-len(examples) // train.batch_size)
    rng = generator(bench.config.run.seed, Stream.PROBE, config["round"], partition)
    _forget_peak_memory(bench.device)
    statistics, flops = probe_layers(
        resident.model,
        resident.layers,
        islice(examples.shuffled(train.batch_size, bench.device, rng), count),
        bench.task.loss,
        config["statistics"],
        precision=train.precision,
    )
    protection, costs = _protection(node, context), {"flops": flops}
    if protection is None:
        costs["peak-memory"] = _peak_memory(bench.device)
    else:
        statistics = protection.statistics(statistics)
    return probe_reply(message, statistics, _stated(len(examples), protection), **costs)


def train(message: Message, context: Context) -> Message:
    """Train the masked blocks and the head, and send back their updates only."""
    node = NodeConfig.read(context.node_config)
    bench = workbench(context.run_config, node)
    config = read_config(message)
    partition, resident, settings = node.partition_id, bench.resident, bench.config.train
    mask = read_mask(message, resident.layers)
    protection = _protection(node, context)
    if protection is not None:
        _check_protected(message, resident.layers)
    if _run_config(context.run_config).secagg.enabled and read_secure(message) is None:
        raise ValueError("secagg.enabled = true, but the server asks for an update in the clear")
    examples, _ = bench.examples(partition)
    steps = settings.steps(len(examples))
    schedule = read_schedule(message, resident.layers, steps)
    if (allowance := _allowance(node, bench, context)) is not None:
        for part, _steps in schedule:
            allowance.check(part)
    resident.move_to(*read_manifest(message), node_store(context))
    seed, server_round = bench.config.run.seed, config["round"]
    rng = generator(seed, Stream.TRAIN, server_round, partition)
    torch.manual_seed(torch_seed(seed, Stream.TRAIN, server_round, partition))  # dropout
    _forget_peak_memory(bench.device)
    batches: Iterator[Batch] = islice(
        examples.shuffled(settings.batch_size, bench.device, rng), steps
    )
    if node.max_step_seconds is not None:
        batches = paced(batches, node.max_step_seconds, bench.device)
    began = time.monotonic()
    update, result = train_update(
        resident,
        mask,
        batches,
        bench.task.loss,
        _optimizer(settings, config["lr"]),
        precision=settings.precision,
        schedule=schedule,
    )
    costs = {"flops": result.flops}
    if protection is None:
        costs |= {"loss": result.loss, "steps": result.steps, "seconds": time.monotonic() - began}
        costs["peak-memory"] = _peak_memory(bench.device)
    else:
        update = dict(protection.update(update))
    parts = compress(
        CODECS[config["codec"]],
        {
            layer: {t: update[t] for t in resident.layers[layer].tensors}
            for layer in _to_send(message, resident.layers, update)
        },
        # Without error feedback where updates are private: an error that is remembered would carry
        # parts of an update into a round that is not counted for them.
        node_store(context) if protection is None else None,
        f"{config['run']}/{partition}",
    )
    return train_reply(message, parts, _stated(len(examples), protection), **costs)


def _check_protected(message: Message, layers: LayerMap) -> None:
    """Refuse instructions that would have a client say more than noise covers."""
    refuse_buffers(layers)
    if read_upload(message) is not None:
        raise ValueError(
            "the server asks for the layers that changed most; which they are would follow from this "
            "client's data, and its updates are private"
        )


def _to_send(message: Message, layers: LayerMap, update: Mapping[str, np.ndarray]) -> list[str]:
    """Return the layers whose updates are due: all that were trained, or those that changed most."""
    trained, upload = layers.trained(read_mask(message, layers)), read_upload(message)
    if upload is None:
        return trained
    (count, norm), (*blocks, head) = upload, trained
    scores = {
        name: change_score((update[p] for p in layers[name].parameters), norm) for name in blocks
    }
    return [*highest(scores, count), head]


def evaluate_locally(message: Message, context: Context) -> Message:
    """Evaluate the global model on this client's held-out examples."""
    node = NodeConfig.read(context.node_config)
    if _protection(node, context) is not None:
        raise ValueError("this client's replies are private; it states no accuracy of its own")
    bench = workbench(context.run_config, node)
    bench.resident.move_to(*read_manifest(message), node_store(context))
    _, held_out = bench.examples(node.partition_id)
    batches = held_out.in_order(256, bench.device)
    accuracy, loss = evaluate(bench.resident.model, batches, bench.task.logits)
    return evaluate_reply(message, len(held_out), accuracy=accuracy, loss=loss)


def build_client_app(mods: list[Mod] | None = None) -> ClientApp:
    """Return a ClientApp with LayerFed's handlers, wrapped in Flower mods of your own."""
    # What mods of the user's see is a finished reply, and one that is not masked yet.
    app = ClientApp(mods=[masking, *(mods or ()), keeping_layers(node_store)])
    app.query("describe")(describe)
    app.query("probe")(probe)
    app.train()(train)
    app.evaluate()(evaluate_locally)
    add_secure_sums(app)
    return app


client_app = build_client_app()
