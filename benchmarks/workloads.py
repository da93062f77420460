"""The models and data of the benchmarks, each as a task of LayerFed and as plain torch for peers.

Data are random, since the benchmarks measure time and memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import timm
import torch
from torch import Tensor, nn

from layerfed.client.training import LossFn
from layerfed.config import RunConfig, load_config
from layerfed.task import Batch, Examples, Task, load_task

IMAGES_OF_A_USER = 50


class SmallCNN(nn.Module):
    """The net of pfl-research's CIFAR-10 benchmark: two convolutions and two dense layers, 1.6 M.

    It has four parts; all but the last are selectable layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU()),
                nn.Sequential(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)),
                nn.Sequential(nn.Flatten(), nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Dropout()),
            ]
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(x)
        return scores


class Random(Task):
    """Random images and labels, which depend on the client's partition id."""

    size, examples, classes = 32, IMAGES_OF_A_USER, 10

    def partition(self, partition_id: int) -> Examples:
        rng = torch.Generator().manual_seed(partition_id)
        return Examples.of(
            {
                "image": torch.randn(self.examples, 3, self.size, self.size, generator=rng),
                "label": torch.randint(self.classes, (self.examples,), generator=rng),
            }
        )

    def test_examples(self) -> Examples:
        return self.partition(10**6).select(np.arange(2))

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        scores: Tensor = model(batch["image"])
        return scores


class CNN(Random):
    """The small net."""

    def build_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return SmallCNN()


class ViTB32(Random):
    """A tower of the size of CLIP's ViT-B/32: 12 blocks, width 768, 87.5 M parameters."""

    size, examples = 224, 8

    def build_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return timm.create_model("vit_base_patch32_224", num_classes=self.classes)


@dataclass(frozen=True)
class Workload:
    """One round's work, the same for every contender.

    `trains` is the strategy: `full` trains everything, and `top` the last block and the head. Each
    contender samples users in its own way; all users have the same number of examples.
    """

    name: str
    task: str
    clients: int
    per_round: int
    batch: int
    steps: int
    trains: str
    overrides: tuple[str, ...] = field(default=())
    lr: float = 0.01

    def config(self, *more: str) -> RunConfig:
        """Return the run's configuration."""
        return load_config(
            None,
            [
                f"task.name={self.task}",
                f"federation.clients={self.clients}",
                f"federation.clients-per-round={self.per_round}",
                f"train.batch-size={self.batch}",
                f"train.local-steps={self.steps}",
                f"train.lr={self.lr}",
                f"strategy.name={self.trains}",
                "run.device=cpu",
                *self.overrides,
                *more,
            ],
        )

    def load(self) -> Task:
        """Return the task."""
        return load_task(self.config())

    def trained(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that every client trains."""
        layers = self.load().layers(model)
        mask = [self.trains == "full"] * (layers.num_blocks - 1) + [True]
        return [name for layer in layers.trained(mask) for name in layers[layer].trained]


WORKLOADS = {
    workload.name: workload
    for workload in (
        # 1,000 users, 50 a round, one pass over 50 images in batches of 10, as in pfl's benchmark.
        Workload("cnn", "workloads:CNN", 1000, 50, 10, 5, "full"),
        Workload("digits", "digits", 10, 10, 32, 5, "top"),
        Workload("vit-b32", "workloads:ViTB32", 20, 20, 4, 1, "top"),
    )
}


def local_sgd(
    model: nn.Module,
    trained: list[str],
    batches: Iterator[Batch],
    loss: LossFn,
    lr: float,
    steps: int,
) -> float:
    """Train some parameters of a model in place, in the simplest way; return the last loss."""
    parameters = dict(model.named_parameters())
    chosen = set(trained)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
    model.train()
    optimizer = torch.optim.SGD([parameters[name] for name in trained], lr=lr)
    value = torch.zeros(())
    for _ in range(steps):
        value = loss(model, next(batches))
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(value.detach())
