"""Your model, data and loss, in plain torch and without LayerFed.

The data are Wisconsin breast cancer, which scikit-learn bundles: 569 biopsies with ten measurements of
cell nuclei, each as mean, standard error and worst value. The model reads them as ten tokens of three
numbers. It mixes over tokens and over channels in turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader

TOKENS, CHANNELS, WIDTH, DEPTH, CLASSES = 10, 3, 16, 6, 2

Batch = Mapping[str, Tensor]
Items = list[dict[str, Tensor]]


class MixerLayer(nn.Module):
    """Mix over the tokens, then over the channels, each with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.token_norm, self.channel_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.tokens = nn.Conv1d(TOKENS, TOKENS, kernel_size=3, padding=1)
        self.channels = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.token_norm(x))
        mixed: Tensor = x + self.channels(self.channel_norm(x))
        return mixed


class Mixer(nn.Module):
    """Embedding, six mixer layers, mean over tokens, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, WIDTH)
        self.blocks = nn.ModuleList(MixerLayer() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(self.norm(x).mean(dim=1))
        return scores


def build_model() -> nn.Module:
    """Return the initial model of the server and all clients.

    It comes from a seed, so the example downloads nothing; load your own checkpoint here. Server and
    clients must build the same weights, since a layer is sent only once it has changed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mixer()


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return class scores."""
    scores: Tensor = model(batch["x"])
    return scores


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss of a batch."""
    return nn.functional.cross_entropy(logits(model, batch), batch["label"])


@lru_cache(maxsize=1)
def _items() -> tuple[Items, Items]:
    """Return training and test examples, the same in every process."""
    raw = load_breast_cancer()
    x_train, x_test, y_train, y_test = train_test_split(
        raw.data, raw.target, test_size=0.25, random_state=0, stratify=raw.target
    )
    mean, deviation = x_train.mean(axis=0), x_train.std(axis=0)

    def items(features: object, labels: object) -> Items:
        x = torch.as_tensor((features - mean) / deviation, dtype=torch.float32)
        # Columns are ten means, ten errors, ten worst values: one token a measurement.
        x = x.reshape(-1, CHANNELS, TOKENS).transpose(1, 2).contiguous()
        y = torch.as_tensor(labels, dtype=torch.int64)
        return [{"x": a, "label": b} for a, b in zip(x, y, strict=True)]

    return items(x_train, y_train), items(x_test, y_test)


@lru_cache(maxsize=1)
def _partitions(num_partitions: int) -> list[list[int]]:
    """Split the training examples over clients, unevenly by label; the same in every process."""
    train, _ = _items()
    labels = [int(item["label"]) for item in train]
    partitioner = DirichletPartitioner(
        num_partitions, "label", alpha=1.0, min_partition_size=20, seed=0
    )
    partitioner.dataset = Dataset.from_dict({"label": labels, "index": range(len(labels))})
    return [list(partitioner.load_partition(i)["index"]) for i in range(num_partitions)]


def client_items(partition: int, num_partitions: int) -> tuple[Items, Items]:
    """Return one client's examples: four fifths for training, the rest for evaluation."""
    train, _ = _items()
    mine = [train[index] for index in _partitions(num_partitions)[partition]]
    return mine[len(mine) // 5 :], mine[: len(mine) // 5]


def server_items() -> Items:
    """Return the server's test set."""
    return _items()[1]


def loader(items: Items, batch_size: int, seed: int | None = None) -> DataLoader[dict[str, Tensor]]:
    """Return batches, in an order drawn from `seed` if one is given."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(items, batch_size, shuffle=generator is not None, generator=generator)  # type: ignore[arg-type]
