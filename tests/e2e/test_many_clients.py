"""Clients of one process share one model: memory does not grow with their number."""

from __future__ import annotations

import gc

import torch
from flwr.app import Message
from torch import Tensor, nn

from layerfed.client.workbench import workbench
from layerfed.client_app import client_app
from layerfed.config import RunConfig
from layerfed.grids.inprocess import InProcessGrid
from layerfed.task.base import Batch
from tests.tiny_task import TinyTask, configured, run

CLIENTS, WIDTH = 100, 128


class Net(nn.Module):
    """A model of 0.3 MB, which is far larger than the clients' data."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)  # type: ignore[no-any-return]


class WideTask(TinyTask):
    """The tiny task with a model that counts."""

    def build_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Net()

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"])  # type: ignore[no-any-return]


def held() -> int:
    """Return the bytes of all tensors of this process."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (Tensor, nn.Parameter):
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Weighed(InProcessGrid):
    """A grid that weighs the process's tensors after every tenth client that trained."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(client_app, config.federation.clients, config.to_flat())
        self.trained = 0
        self.bytes: list[int] = []

    def _work(self, message: Message) -> Message:
        reply = super()._work(message)
        if message.metadata.message_type == "train":
            assert reply.has_content()
            self.trained += 1
            if self.trained % 10 == 0:
                self.bytes.append(held())
        return reply


def test_a_hundred_clients_hold_one_model() -> None:
    config = configured(
        *(f"task.name={__name__}:WideTask", f"federation.clients={CLIENTS}"),
        *(f"federation.clients-per-round={CLIENTS}", "strategy.name=top", "train.local-steps=1"),
    )
    # The first client's workbench, since it takes the place of one of an earlier test.
    model = sum(t.nbytes for t in workbench(config.to_flat()).resident.tensors.values())
    before = held()
    grid = Weighed(config)
    run(config, 1, grid)
    assert grid.trained == CLIENTS
    assert max(grid.bytes) - min(grid.bytes) < 0.05 * model
    # The server's model, a copy of what is trained, and the data of all clients.
    assert max(grid.bytes) - before < 3 * model
