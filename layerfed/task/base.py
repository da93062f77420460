"""What LayerFed needs to know of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from layerfed.config import ConfigError, RunConfig
from layerfed.layers import LayerMap, LayerMapError
from layerfed.seeding import Stream, generator

__all__ = ["Batch", "Examples", "Task"]

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Examples:
    """A set of examples in memory: tensors of equal first dimension, by name."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(next(iter(self.tensors.values())))

    def select(self, indices: np.ndarray) -> Examples:
        """Return some of the examples."""
        index = torch.as_tensor(indices)
        return Examples({name: tensor[index] for name, tensor in self.tensors.items()})

    def in_order(self, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """Yield all examples once, in order; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            stop = start + batch_size
            yield {n: t[start:stop].to(device) for n, t in self.tensors.items()}

    def shuffled(
        self, batch_size: int, device: torch.device, rng: np.random.Generator
    ) -> Iterator[Batch]:
        """Yield batches without end, reshuffled after each pass.

        A client with fewer examples than a batch yields all it has each time; the last batch of a pass
        may be smaller, so every example is seen once a pass.
        """
        while True:
            order = rng.permutation(len(self))
            for start in range(0, len(order), batch_size):
                index = torch.from_numpy(order[start : start + batch_size])
                yield {n: t[index].to(device) for n, t in self.tensors.items()}


class Task(ABC):
    """Data, model and loss of one experiment.

    Parameters
    ----------
    config : RunConfig
        The run; a task reads `task`, `model` and `run.seed` of it.

    Notes
    -----
    A task is built once per process and asked often, so loading and partitioning belong in cached
    properties. Everything must depend on the configuration only: server and clients build their own.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Return the pretrained model with a new head, drawn from `Stream.HEAD`."""

    @abstractmethod
    def partition(self, partition_id: int) -> Examples:
        """Return all examples of one client."""

    @abstractmethod
    def test_examples(self) -> Examples:
        """Return the server's test set."""

    @abstractmethod
    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return class scores, shape (batch, classes)."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of a batch with integer labels under `label`."""
        return nn.functional.cross_entropy(self.logits(model, batch).float(), batch["label"])

    def layers(self, model: nn.Module) -> LayerMap:
        """Split the model into layers, by the configuration's patterns or automatically.

        Raises
        ------
        ConfigError
            If the model cannot be split that way.
        """
        section = self.config.model
        extra = [name.strip() for name in section.head.split(",") if name.strip()]
        try:
            return LayerMap.from_model(model, blocks=section.blocks or None, head=extra)
        except LayerMapError as error:
            raise ConfigError(str(error)) from None

    def client_examples(self, partition_id: int) -> tuple[Examples, Examples]:
        """Return one client's training and held-out examples (`task.local-test` of them)."""
        examples = self.partition(partition_id)
        share = self.config.task.local_test
        held_out = max(1, int(len(examples) * share)) if share else 0
        rng = generator(self.config.run.seed, Stream.LOCAL_TEST, partition_id)
        order = rng.permutation(len(examples))
        if not held_out:
            return examples, examples.select(order[:0])
        return examples.select(np.sort(order[held_out:])), examples.select(order[:held_out])
