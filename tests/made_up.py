"""A federation whose clients exist only as replies: rounds are fast, and replies can be forged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, MetricRecord
from safetensors.numpy import load_file

from layerfed.client.workbench import workbench
from layerfed.config import load_config
from layerfed.exchange import (
    Description,
    Probe,
    TrainInstruction,
    describe_reply,
    evaluate_reply,
    probe_reply,
    read_config,
    read_manifest,
    record_of,
    train_reply,
)
from layerfed.exchange.messages import state_held
from layerfed.models.layers import LayerMap
from layerfed.runs.records import Observer, RoundRecord
from layerfed.strategies import ILP, RoundSettings, SelectiveStrategy
from tests.conftest import TinyNet
from tests.fakes import PlayedGrid

# Changes an honest reply; it may raise, as Flower does if it cannot build a reply.
Forge = Callable[[Message], Message]


def final_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a run's final model: those of the base, and over them the layers that changed."""
    base = workbench(load_config(folder / "config.json").to_flat()).resident.base_state()
    return base | load_file(folder / "final.safetensors")


def _base() -> dict[str, np.ndarray]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {name: tensor.numpy() for name, tensor in TinyNet().state_dict().items()}


BASE = _base()
LAYERS = LayerMap.from_model(TinyNet())


class Federation(PlayedGrid):
    """Node p + 2 holds partition p; a reply is made when it is pulled.

    Parameters
    ----------
    clients : int
    forged : Mapping[tuple[int, str], Forge]
        By partition and message type.
    layers : LayerMap
    """

    def __init__(
        self,
        clients: int,
        forged: Mapping[tuple[int, str], Forge] | None = None,
        layers: LayerMap = LAYERS,
    ) -> None:
        super().__init__(range(2, 2 + clients))
        self.clients, self.layers = clients, layers
        self.forged = forged or {}

    def answer(self, message: Message) -> Message:
        partition, kind = message.metadata.dst_node_id - 2, message.metadata.message_type
        reply = honest(message, partition, self.clients, self.layers)
        forge = self.forged.get((partition, kind))
        return reply if forge is None else forge(reply)


def honest(message: Message, partition: int, clients: int, layers: LayerMap = LAYERS) -> Message:
    """The reply of a client whose gradients and updates are drawn at random, the same in every run."""
    kind, config = message.metadata.message_type, read_config(message)
    rng = np.random.default_rng([partition, config["round"], len(kind)])
    count = 10 + partition
    if kind == "query.describe":
        return describe_reply(message, Description(partition, count, partitions=clients))
    if kind == "query.probe":
        on = sum(Probe.read(config, LAYERS.num_blocks).blocks)
        rows = {name: rng.random(on).tolist() for name in config["statistics"]}
        reply = probe_reply(message, rows, count, flops_probe=8.0)
    elif kind == "evaluate":
        reply = evaluate_reply(
            message, 3 + partition, client_loss=rng.random(), client_accuracy=rng.random()
        )
    else:
        asked = TrainInstruction.read(message, LAYERS.num_blocks)
        names = [name for layer in asked.asked(layers) for name in layers[layer].tensors]
        update = {name: drawn(rng, BASE[name]) for name in names}
        parts = asked.codec_for(LAYERS).encode(update)
        names, on = (asked.probe.statistics, sum(asked.probe.blocks)) if asked.probe else ((), 0)
        rows = {name: rng.random(on).tolist() for name in names}
        costs = {"steps": 2, "flops": 8.0, "flops_probe": 8.0}
        reply = train_reply(
            message, parts, count, rows if rows else None, train_loss=rng.random(), **costs
        )
    state_held(reply, read_manifest(message)[0].digests.values(), f"store of {partition}")
    return reply


def drawn(rng: np.random.Generator, like: np.ndarray) -> np.ndarray:
    """Return a plausible update of a tensor."""
    if np.issubdtype(like.dtype, np.integer):
        return np.asarray(rng.integers(1, 9), like.dtype)
    return np.asarray(0.01 * rng.standard_normal(like.shape), like.dtype)


@dataclass
class Outcome(Observer):
    """The results of a run."""

    model: dict[str, np.ndarray] = field(default_factory=dict)
    rounds: list[RoundRecord] = field(default_factory=list)

    def on_round(self, record: RoundRecord) -> None:
        self.rounds.append(record)


def strategy_for(
    clients: int, kind: type[SelectiveStrategy] = ILP, layers: LayerMap = LAYERS, **options: Any
) -> SelectiveStrategy:
    """A strategy whose masks for one client do not depend on the others."""
    options = {"consistency": 0.0, "clients": clients, "client_evaluation": True, **options}
    rounds = {f.name: options.pop(f.name) for f in fields(RoundSettings) if f.name in options}
    return kind(layers, settings=RoundSettings(**rounds), **options)


def run(grid: Federation, rounds: int = 2, **options: Any) -> Outcome:
    strategy = strategy_for(grid.clients, layers=grid.layers, **options)
    outcome = Outcome()
    strategy.observers = (outcome,)
    strategy.start(
        grid,
        record_of(BASE),
        rounds,
        timeout=60,
        train_config=ConfigRecord({"lr": 0.1}),
        evaluate_fn=lambda number, arrays: MetricRecord({"accuracy": 0.5, "loss": 1.0}),
    )
    outcome.model = strategy.model.tensors
    return outcome
