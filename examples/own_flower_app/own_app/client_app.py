"""The client: four handlers that pass your model and data to LayerFed."""

from __future__ import annotations

from functools import lru_cache, partial
from itertools import chain, islice

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from layerfed.client.probe import probe_layers
from layerfed.client.resident import ResidentModel, keeping_layers
from layerfed.client.training import evaluate, train_update
from layerfed.config.seeding import Stream, torch_seed
from layerfed.exchange import (
    Description,
    LayerStore,
    TrainInstruction,
    describe_reply,
    evaluate_reply,
    open_store,
    probe_reply,
    read_config,
    read_manifest,
    train_reply,
)
from layerfed.models.layers import LayerMap
from own_app.task import Items, build_model, client_items, loader, logits, loss


def layer_store(context: Context) -> LayerStore:
    """Return this node's store for layers: a folder of its own, or the user's cache folder."""
    return open_store(str(context.node_config.get("store", "")))


app = ClientApp(mods=[keeping_layers(layer_store)])


@lru_cache(maxsize=1)
def resident_model() -> ResidentModel:
    """Return this process's model. It is built once, and messages then load only changed layers."""
    device = torch.device("cpu")
    return ResidentModel(build_model, LayerMap.from_model, device)


def place(context: Context) -> tuple[int, int]:
    """Return this node's partition id and the number of partitions."""
    node = context.node_config
    return int(node["partition-id"]), int(node["num-partitions"])


def examples(context: Context) -> tuple[Items, Items]:
    """Return this node's examples for training and for evaluation."""
    return client_items(*place(context))


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Describe this node: sampling and seeds use its partition, since Flower's node ids are random."""
    partition, partitions = place(context)
    train_items, _ = examples(context)
    return describe_reply(message, Description(partition, len(train_items), partitions=partitions))


@app.query("probe")
def probe(message: Message, context: Context) -> Message:
    """Measure the statistics of the strategy: one number for each layer."""
    resident, config = resident_model(), read_config(message)
    resident.move_to(*read_manifest(message), layer_store(context))
    items, _ = examples(context)
    # 0 batches means all of them.
    batches = islice(
        loader(items, int(context.run_config["batch-size"])), config["batches"] or None
    )
    statistics, flops = probe_layers(
        resident.model, resident.layers, batches, loss, config["statistics"]
    )
    return probe_reply(message, statistics, len(items), flops_probe=flops)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the selected layers and the head; reply with their updates only."""
    resident, run = resident_model(), context.run_config
    asked = TrainInstruction.read(message, resident.layers.num_blocks)
    resident.move_to(*read_manifest(message), layer_store(context))
    items, _ = examples(context)
    partition, _ = place(context)
    # A seed of this round and client, so that a run repeats on any engine.
    seed = torch_seed(int(run["seed"]), Stream.TRAIN, asked.round, partition)
    torch.manual_seed(seed)
    batches = loader(items, int(run["batch-size"]), seed)
    update, result = train_update(
        resident,
        asked.mask,
        chain.from_iterable(batches for _ in range(int(run["local-epochs"]))),
        loss,
        partial(torch.optim.SGD, lr=asked.lr),
    )
    costs = {"steps": result.steps, "flops": result.flops}
    return train_reply(message, update, len(items), train_loss=result.loss, **costs)


@app.evaluate()
def evaluate_locally(message: Message, context: Context) -> Message:
    """Evaluate the global model on this node's held-out examples."""
    resident = resident_model()
    resident.move_to(*read_manifest(message), layer_store(context))
    _, items = examples(context)
    accuracy, mean_loss = evaluate(resident.model, loader(items, 256), logits)
    return evaluate_reply(message, len(items), client_accuracy=accuracy, client_loss=mean_loss)
