"""Whole rounds on the tiny model: real strategy, messages and ClientApp, milliseconds a round."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from flwr.app import ConfigRecord
from torch import Tensor, nn

from layerfed.client.workbench import workbench
from layerfed.config import RunConfig, load_config
from layerfed.config.seeding import Stream, generator
from layerfed.engine import InProcessGrid
from layerfed.exchange import record_of
from layerfed.runs.checkpoint import Checkpoint
from layerfed.runs.records import Observer, RoundRecord
from layerfed.server_app import build_strategy
from layerfed.task.base import Batch, Examples, Task
from tests.conftest import CLASSES, TinyNet
from tests.fakes import Recorded

QUICK = [
    "federation.clients=6",
    "federation.clients-per-round=4",
    "train.local-steps=2",
    "train.batch-size=8",
    "train.lr=0.1",
]


class TinyTask(Task):
    """A task in which each client has other points, and no two clients have the same number."""

    def build_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return TinyNet()

    def partition(self, partition_id: int) -> Examples:
        rng = generator(self.config.run.seed, Stream.PARTITION, partition_id)
        count = (
            10 + 4 * partition_id
        )  # no batch of 8 is left with one example, which BatchNorm refuses
        x = rng.standard_normal((count, 5)) + rng.standard_normal(5)
        y = rng.integers(CLASSES, size=count)
        return Examples.of({"x": torch.tensor(x, dtype=torch.float32), "label": torch.tensor(y)})

    def test_examples(self) -> Examples:
        return self.partition(99)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"])  # type: ignore[no-any-return]


def configured(*overrides: str) -> RunConfig:
    return load_config(None, [*QUICK, *overrides])


@dataclass
class Run(Observer):
    """The results of a run: the tensors before and after, and its rounds."""

    before: dict[str, np.ndarray] = field(default_factory=dict)
    after: dict[str, np.ndarray] = field(default_factory=dict)
    rounds: list[RoundRecord] = field(default_factory=list)

    def on_round(self, record: RoundRecord) -> None:
        self.rounds.append(record)

    def masks(self, number: int) -> dict[int, list[int]]:
        """Selected layers of each client in a round, from 1."""
        selection = self.rounds[number - 1].selection
        assert selection is not None
        rows = zip(selection.clients, selection.choice.masks, strict=True)
        return {client: np.flatnonzero(mask).tolist() for client, mask in rows}


def run(
    config: RunConfig, rounds: int = 1, grid: InProcessGrid | None = None, timeout: float = 60
) -> Run:
    bench, found = workbench(config.to_flat()), Run()
    strategy = build_strategy(config, bench.resident.layers)
    strategy.observers = (found,)
    found.before = bench.resident.base_state()
    strategy.start(
        grid if grid is not None else Recorded(config),
        record_of(found.before),
        rounds,
        timeout=timeout,
        train_config=ConfigRecord({"lr": config.train.lr}),
    )
    found.after = strategy.model.tensors
    return found


def check_resumed(config: RunConfig) -> None:
    """A run that is resumed after two of four rounds ends with the same model to the bit."""
    checkpoints: dict[int, Checkpoint] = {}

    class Kept(Observer):
        def on_round(self, record: RoundRecord) -> None:
            taken = strategy.checkpoint()
            copies = {name: array.copy() for name, array in taken.layers.items()}
            checkpoints[record.round] = replace(taken, layers=copies, state=dict(taken.state))

    found = []
    for after in (0, 2):
        resident = workbench(config.to_flat()).resident
        strategy = build_strategy(config, resident.layers)
        strategy.observers = (Kept(),)
        if after:
            strategy.resume(checkpoints[after])
            checkpoints.clear()
        lr = ConfigRecord({"lr": config.train.lr})
        base = record_of(resident.base_state())
        strategy.start(Recorded(config), base, 4, timeout=60, train_config=lr)
        found.append(strategy.model.tensors)
    assert list(checkpoints) == [3, 4]
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])
