"""The ClientApp: one client's side of a round.

Flower loads `client_app`. `build_client_app` makes another one, with mods or steps of your own. Between
messages a process keeps the resident workbench: task and model, built once for each configuration. What
a client must know in its next process is in Flower's context, or in the layer store.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import accumulate, islice
from logging import ERROR

import torch
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from flwr.common.logger import log
from torch import nn

from layerfed.client.costs import MEASURED_UNITS
from layerfed.client.deadline import Clock
from layerfed.client.limits import paced
from layerfed.client.local_optimizers import (
    Clipped,
    InPart,
    LocalAdamW,
    LocalOptimizer,
    LocalSGD,
)
from layerfed.client.personal import own_layers
from layerfed.client.probe import probe_layers
from layerfed.client.resident import keeping_layers
from layerfed.client.skipping import skipped
from layerfed.client.statistics import of_data
from layerfed.client.steps import ClientStep, Departure, steps_of
from layerfed.client.training import OptimizerFn, TrainResult, train_update
from layerfed.client.workbench import Node, Workbench, node_store, run_config_of
from layerfed.config import ConfigError, NodeConfig, TrainConfig
from layerfed.config.seeding import Stream, generator, torch_seed
from layerfed.exchange import (
    WRONG_SETTINGS,
    Description,
    Probe,
    TrainInstruction,
    Work,
    describe_reply,
    evaluate_reply,
    probe_reply,
    read_config,
    read_manifest,
    train_reply,
)
from layerfed.exchange.instruction import read_runs
from layerfed.flower_compat import ErrorCode
from layerfed.models.factors import of_ranks
from layerfed.models.layers import LayerMap
from layerfed.secure.client import add_secure_sums
from layerfed.secure.messages import read_secure
from layerfed.task import Batch
from layerfed.task.scoring import evaluate_task

__all__ = ["build_client_app", "client_app", "local_optimizer"]


def describe(message: Message, context: Context) -> Message:
    """Answer with this node's partition, its number of examples, and its budget."""
    code = WRONG_SETTINGS
    try:
        NodeConfig.read(context.node_config).applied_to(run_config_of(context.run_config))
        # What is wrong from here on may be mended while the run waits: the node is asked again.
        code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        return describe_reply(message, _description(Node.of(context)))
    except ConfigError as error:
        # A reply and not an error, for which Flower would log a traceback for each client.
        log(ERROR, "this node cannot take part: %s", error)
        return Message(Error(code, str(error)), reply_to=message)


def _description(node: Node) -> Description:
    # The server refuses a partition that does not exist, with a message that says what to do.
    clients = node.run.federation.clients
    exists = not clients or node.partition < clients
    unit = node.run.budget.unit
    costs = depth_costs = allowance = None
    if exists:
        allowance = node.allowance(again=True)
        if unit in MEASURED_UNITS:
            costs, depth_costs = (tuple(x) for x in node.bench.costs(node.partition, unit))
    count = len(node.bench.examples(node.partition)[0]) if exists else 1
    return Description(
        partition=node.partition,
        examples=node.stated(count),
        budget=None if allowance is None else allowance.budget,
        partitions=node.settings.num_partitions,
        costs=costs,
        depth_costs=depth_costs,
    )


def _as_asked(message: Message, context: Context) -> Node:
    """Return this node, if it still is what the server takes it for.

    Raises
    ------
    ValueError
        If it holds another partition or more examples, or in a secure sum fewer: it was restarted since
        it described itself, and the server will ask it again.
    """
    node, taken_for = Node.of(context), read_config(message)
    if taken_for.get("client", node.partition) != node.partition:
        raise ValueError(
            f"this node holds partition {node.partition}, and client {taken_for['client']} is asked"
        )
    count = node.stated(len(node.bench.examples(node.partition)[0]))
    stated = taken_for.get("examples", count)
    if count > stated or (count < stated and read_secure(message) is not None):
        raise ValueError(f"this node has {count} examples, and stated {stated} when it joined")
    return node


def probe(message: Message, context: Context) -> Message:
    """Measure each layer's gradient at θ^t on this client's data."""
    node, asked = _as_asked(message, context), read_config(message)
    bench, layers = node.bench, node.bench.resident.layers
    own = Probe.read(asked, layers.num_blocks)
    _check_part(node, own)
    bench.resident.move_to(*read_manifest(message), node.store)
    examples, _ = bench.examples(node.partition)
    with own_layers(node, message), skipped(bench.resident.model, layers, read_runs(asked)):
        statistics, numbers = _measured(node, own, asked["round"], at_global=True)
    return probe_reply(message, statistics, node.stated(len(examples)), **numbers)


def _check_part(node: Node, asked: Probe) -> None:
    """Refuse to measure a part of the layers if this client clips its statistics.

    Raises
    ------
    ValueError
        If it does.
    """
    if node.protection is not None and node.protection.statistics_clip and not all(asked.blocks):
        raise ValueError(
            "the server asks for a part of the layers (strategy.probe-share), and this client clips its "
            "statistics as a whole: parts of several rounds would not be on one scale"
        )


def _measured(
    node: Node, asked: Probe, server_round: int, *, at_global: bool
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Measure statistics for a round's selection at the model as it is; return the metrics too.

    Norms of weights are public where these are those of the global model.
    """
    bench, settings = node.bench, node.bench.config.train
    examples, _ = bench.examples(node.partition)
    # A client with fewer examples has smaller batches.
    whole = min(asked.examples or settings.batch_size, len(examples))
    size = min(whole, settings.micro_batch or whole)
    count = asked.batches * -(-whole // size) or -(-len(examples) // size)
    rng = generator(bench.config.run.seed, Stream.PROBE, server_round, node.partition)
    work = Work("probe", bench.device, speed=node.run.federation.speed(node.partition))
    statistics, work.flops = probe_layers(
        bench.resident.model,
        bench.resident.layers,
        islice(examples.shuffled(size, bench.device, rng), count),
        bench.loss(node.partition),
        asked.statistics,
        precision=bench.step.precision,
        lr=settings.lr,
        checkpointing=bench.step.checkpointing,
        blocks=asked.blocks,
        cache=bench.prefix,
    )
    if node.protection is not None:
        covered = of_data(statistics, bench.resident.layers, at_global=at_global)
        statistics = node.protection.statistics(statistics, {*statistics} - {*covered})
    return statistics, work.numbers(private=node.protection is not None)


def train(message: Message, context: Context, own: tuple[ClientStep, ...] = ()) -> Message:
    """Train the selected blocks and the head, and reply with their updates only.

    A client that is asked for the statistics of its next selection measures them at the model that its
    training left: the next global model is not known to it.
    """
    node = _as_asked(message, context)
    bench, layers = node.bench, node.bench.resident.layers
    settings = bench.config.train
    instruction = TrainInstruction.read(message, layers.num_blocks)
    if instruction.probe is not None:
        _check_part(node, instruction.probe)
    steps = steps_of(node, instruction, message, own)
    for step in steps:
        step.check(layers)
    examples, _ = bench.examples(node.partition)
    schedule = instruction.schedule(settings.steps(len(examples)))
    if (allowance := node.allowance()) is not None:
        for mask, _steps in schedule:
            allowance.check(mask, instruction.share(layers))
    bench.resident.move_to(*read_manifest(message), node.store)
    federation, due = node.run.federation, instruction.deadline
    work = Work("train", bench.device, speed=federation.speed(node.partition))
    lr = settings.lr if instruction.lr is None else instruction.lr
    optimizer = local_optimizer(settings, lr, bench.resident.model, layers)
    if instruction.rank is not None:
        optimizer = of_first_ranks(optimizer, bench.resident.model, instruction.rank)
    numbers: dict[str, float] = {}
    statistics: dict[str, list[float]] | None = None

    def note(result: TrainResult) -> None:
        nonlocal statistics
        work.loss, work.steps = result.loss, result.steps
        work.flops = (clock and clock.flops) or result.flops
        work.memory = asdict(result.memory)
        work.prefix_hits, work.flops_saved = result.found / result.examples, result.saved
        # Before the probe, whose time, memory and FLOPs are counted apart.
        numbers.update(work.numbers(private=node.protection is not None))
        if instruction.probe is not None:
            statistics, more = _measured(
                node, instruction.probe, instruction.round + 1, at_global=False
            )
            numbers.update(more)

    with (
        own_layers(node, message) as own_parts,
        skipped(bench.resident.model, layers, instruction.runs),
        Clock(due, bench.device, work.speed) if due else nullcontext() as clock,
    ):
        update, result = train_update(
            bench.resident,
            instruction.mask,
            _batches(
                node, instruction, settings, list(accumulate((n for _, n in schedule), initial=1))
            ),
            bench.loss(node.partition),
            optimizer,
            how=bench.step,
            schedule=schedule,
            cache=bench.prefix,
            clock=clock,
            then=note,
        )
        done = {t for layer in result.layers for t in (*layers[layer].tensors, *layers[layer].own)}
        shared = own_parts.keep({name: change for name, change in update.items() if name in done})
    if result.late and federation.late == "drop":
        shared = {}
    departure = Departure(
        instruction.part(shared),
        tuple(name for name in layers.trained(instruction.mask) if name not in layers.personal),
        node.stated(len(examples)),
        numbers,
    )
    for step in steps:
        departure = step(departure, layers)
    return train_reply(
        message, departure.tensors, departure.examples, statistics, **departure.numbers
    )


def _batches(
    node: Node, instruction: TrainInstruction, settings: TrainConfig, fresh: Collection[int]
) -> Iterator[Batch]:
    """Return the batches of one round, drawn from the streams of round and client.

    A node may bound the time of a step, but for those that begin a mask, whose numbers are `fresh`.
    """
    bench = node.bench
    seed, number, partition = bench.config.run.seed, instruction.round, node.partition
    rng = generator(seed, Stream.TRAIN, number, partition)
    # For dropout. To seed every kind of device takes a millisecond.
    device = torch.default_generator if bench.device.type == "cpu" else torch
    device.manual_seed(torch_seed(seed, Stream.TRAIN, number, partition))
    examples, _ = bench.examples(partition)
    # Images are changed one by one, which the processor does faster than a GPU.
    place = torch.device("cpu") if settings.augment != "none" else bench.device
    batches: Iterator[Batch] = islice(
        examples.shuffled(settings.batch_size, place, rng), settings.steps(len(examples))
    )
    if settings.augment != "none":
        batches = _augmented(batches, bench, number, partition)
    if node.settings.max_step_seconds is None:
        return batches
    return paced(batches, node.settings.max_step_seconds, bench.device, fresh)


def _augmented(
    batches: Iterator[Batch], bench: Workbench, number: int, partition: int
) -> Iterator[Batch]:
    """Yield the batches of a round with random changes, which do not disturb other draws."""
    for step, batch in enumerate(batches):
        with torch.random.fork_rng(devices=[]):
            seed = bench.config.run.seed
            # Not `torch.manual_seed`, which would set the generators of GPUs too.
            torch.default_generator.manual_seed(
                torch_seed(seed, Stream.AUGMENT, number, partition, step)
            )
            changed = bench.task.augment(batch)
        yield {name: tensor.to(bench.device) for name, tensor in changed.items()}


def local_optimizer(
    train: TrainConfig, lr: float, model: nn.Module, layers: LayerMap
) -> OptimizerFn:
    """Return a function that builds the local optimiser from the parameters of `model` to train.

    The head's own rate changes over the rounds as `lr` does.
    """

    def build(parameters: list[nn.Parameter]) -> LocalOptimizer:
        optimizer: LocalAdamW | LocalSGD
        if train.optimizer == "adamw":
            optimizer = LocalAdamW(parameters, lr, train.weight_decay)
        else:
            optimizer = LocalSGD(parameters, lr, train.momentum, train.weight_decay)
        if train.head_lr:
            named = dict(model.named_parameters())
            rate = lr * train.head_lr / train.lr
            optimizer.rates = {named[name]: rate for name in layers["head"].trained}
        bound = train.clip_gradient
        return Clipped(optimizer, parameters, bound) if bound else optimizer

    return build


def of_first_ranks(build: OptimizerFn, model: nn.Module, rank: int) -> OptimizerFn:
    """Return a function like `build`, whose optimiser moves only the first ranks of each adapter."""

    def made(parameters: list[nn.Parameter]) -> LocalOptimizer:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        others = {id(p): of_ranks(names[id(p)], slice(rank, None)) for p in parameters}
        frozen = [(p, others[id(p)]) for p in parameters if slice(rank, None) in others[id(p)]]
        return InPart(build(parameters), frozen)

    return made


def evaluate_locally(message: Message, context: Context) -> Message:
    """Evaluate the global model on this client's held-out examples."""
    node = _as_asked(message, context)
    bench = node.bench
    if node.protection is not None:
        raise ValueError("this client's replies are private; it states no scores of its own")
    bench.resident.move_to(*read_manifest(message), node.store)
    _, held_out = bench.examples(node.partition)
    rows = node.run.run.evaluate_batch or bench.evaluation_rows
    with own_layers(node, message):
        found = evaluate_task(
            *(bench.task, bench.resident.model, held_out, rows, bench.device), logits=bench.logits
        )
    # A score that these examples leave undefined is not stated.
    stated = {f"client_{k}": float(v) for k, v in found.scores.items() if v is not None}
    return evaluate_reply(message, len(held_out), **stated)


def build_client_app(
    mods: list[Mod] | None = None, steps: tuple[ClientStep, ...] = ()
) -> ClientApp:
    """Return a ClientApp with LayerFed's handlers.

    Parameters
    ----------
    mods : list[Mod], optional
        Flower mods of your own; they see a finished reply.
    steps : tuple[ClientStep, ...]
        Steps of your own; they see an update before it is encoded and padded.
    """
    app = ClientApp(mods=[*(mods or ()), keeping_layers(node_store)])
    app.query("describe")(describe)
    app.query("probe")(probe)
    app.train()(partial(train, own=steps))
    app.evaluate()(evaluate_locally)
    add_secure_sums(app)
    return app


client_app = build_client_app()
