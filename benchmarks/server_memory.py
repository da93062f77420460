"""Peak memory of the server in one round, by number of clients: LayerFed and Flower's FedAvg.

    python benchmarks/server_memory.py --json server_memory.json

The model is a transformer's arrays (12 blocks, 10 million parameters, 41 MB). Replies are serialised, as
from a network. Each of LayerFed's clients trains one block and the head; FedAvg's replies hold the whole
model, as in its tutorial. A reply is made when it is pulled, and FedAvg's start() pulls all before it
aggregates. Each number is the peak of a process of its own, less its memory before the round.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from rich.console import Console
from rich.table import Table
from torch import nn

from layerfed.exchange import Description, describe_reply
from layerfed.flower_compat import enter_run, stamp
from layerfed.models.layers import LayerMap
from layerfed.strategies import Random

WIDTH, DEPTH = 256, 12
console = Console()


class Who(StrEnum):
    """The two servers."""

    LAYERFED = "layerfed"
    FEDAVG = "fedavg"


class Net(nn.Module):
    """Embeddings, blocks and head of a small transformer; it is never run here."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True) for _ in range(DEPTH)
        )
        self.head = nn.Linear(WIDTH, 10)


class Replies(Grid):
    """Clients that exist only as replies, which are made when they are pulled."""

    def __init__(self, clients: int, arrays: dict[str, np.ndarray], layers: LayerMap) -> None:
        enter_run()
        self.clients, self.arrays, self.layers = clients, arrays, layers
        self.waiting: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return range(2, 2 + self.clients)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        identities = []
        for message in messages:
            identity = f"m{message.metadata.dst_node_id}-{message.metadata.message_type}"
            stamp(message, message_id=identity)
            self.waiting[identity] = message
            identities.append(identity)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ready = [identity for identity in message_ids if identity in self.waiting]
        return [self.answer(self.waiting.pop(ready[0]))] if ready else []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        identities = self.push_messages(messages)
        return [self.answer(self.waiting.pop(identity)) for identity in identities]

    def answer(self, message: Message) -> Message:
        if message.metadata.message_type == "query.describe":
            return describe_reply(message, Description(message.metadata.dst_node_id - 2, 10))
        config = message.content.config_records["config"]
        names: Iterable[str] = self.arrays
        if "mask" in config:
            trained = self.layers.trained([bool(m) for m in config["mask"]])
            names = [tensor for layer in trained for tensor in self.layers[layer].tensors]
        record = ArrayRecord()
        for name in names:
            record[name] = Array(self.arrays[name])  # serialised, as from the network
        metrics = MetricRecord({"examples": 10, "num-examples": 10, "loss": 1.0})
        return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message: ...


def work(who: Who, clients: int) -> float:
    """Run one round; return the rise of this process's peak memory in MB."""
    torch.manual_seed(0)
    model = Net()
    layers = LayerMap.from_model(model)
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    grid = Replies(clients, arrays, layers)
    initial = ArrayRecord(model.state_dict())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if who == Who.LAYERFED:
        Random(layers, budget=1).start(grid, initial, 1, train_config=ConfigRecord({"lr": 0.1}))
    else:
        FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients).start(
            grid, initial, 1
        )
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3


def main(
    clients: Annotated[list[int] | None, typer.Option(help="clients in the round")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the table here")] = None,
    who: Annotated[Who | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure, print a table, and write it as JSON."""
    counts = clients or [10, 50, 100, 200]
    if who:
        print("\n" + json.dumps(work(who, counts[0])))
        return
    rows = []
    for count in counts:
        row: dict[str, float] = {"clients": count}
        for name in Who:
            done = subprocess.run(
                [sys.executable, __file__, "--who", name, "--clients", str(count)],
                env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0"},
                capture_output=True,
                text=True,
                check=True,
            )
            row[name] = float(done.stdout.splitlines()[-1])
        rows.append(row)
    table = Table("clients", "LayerFed, MB", "FedAvg, MB", "ratio")
    for row in rows:
        ratio = row["fedavg"] / row["layerfed"]
        table.add_row(
            *(f"{row[key]:.0f}" for key in ("clients", "layerfed", "fedavg")), f"{ratio:.0f}"
        )
    console.print(table)
    if json_file:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
