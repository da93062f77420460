"""Handwritten digits: the built-in task for a first run, for tests, and for quick comparisons.

1,797 grey 8x8 digits from UCI, which ship with the package, enlarged to the 32x32 colour input of the
shipped ViT, which was pretrained on CIFAR-100 photographs.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerfed.config import RunConfig
from layerfed.config.errors import naming_extras
from layerfed.models.image import build_image_classifier
from layerfed.models.source import shipped_file
from layerfed.task.base import Batch, Examples, Inputs, Task
from layerfed.task.partition import partition_indices

CLASSES = 10


class Digits(Task):
    """Digits on the shipped ViT: 1,437 training and 360 test images, the same for every seed."""

    never_augmented = "a mirrored digit is no digit, or another one"

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        with np.load(shipped_file("task.name = 'digits'", "digits.npz")) as raw:
            images = raw["image"]
            labels, train, test = (
                raw[name].astype(np.int64) for name in ("label", "train", "test")
            )
        self._labels = labels[train]
        everything = Examples.of({"image": _inputs(images), "label": torch.from_numpy(labels)})
        self._train, self._test = everything.select(train), everything.select(test)

    @property
    def classes(self) -> tuple[str, ...]:
        """The ten digits."""
        return tuple(map(str, range(CLASSES)))

    def preprocessing(self) -> dict[str, Any]:
        """Return how a digit becomes the model's input."""
        return {
            "input": "image",
            "colours": "grey, ink is light",
            "squash": True,
            "resize": 8,
            "interpolation": "box",
            "crop_share": 1.0,
            "crop": 8,
            "size": 32,
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
        }

    @cached_property
    def _indices(self) -> list[np.ndarray]:
        return partition_indices(self._labels, self.config)

    def build_model(self) -> nn.Module:
        """Return the shipped ViT, or the same net from random weights (`model.weights`)."""
        return build_image_classifier(self.config.model, CLASSES, self.config.run.seed).net

    def partition(self, partition_id: int) -> Examples:
        """Return the digits of one client."""
        return self._train.select(self._indices[partition_id])

    def test_examples(self) -> Examples:
        """Return the 360 test digits."""
        return self._test

    def read(self, file: Path) -> Inputs:
        """Return an image of a digit, light ink on dark ground as in the data."""
        with naming_extras(f"reading {file}"):
            from PIL import Image

            from layerfed.task.pixels import open_image
        image = open_image({"path": str(file)}, str(file.parent))
        grey = image.convert("L").resize((8, 8), Image.Resampling.BOX)
        pixels = np.asarray(grey)[None] * (16 / 255)
        batch = {"image": _inputs(pixels), "label": torch.zeros(1, dtype=torch.int64)}
        return Inputs([str(file)], Examples.of(batch))

    def example(self) -> Batch:
        """Return a blank image."""
        return {"image": torch.zeros(1, 1, 32, 32)}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return scores of the ten digits; the grey channel is expanded to colour without a copy."""
        scores: Tensor = model(batch["image"].expand(-1, 3, -1, -1))
        return scores


def _inputs(pixels: np.ndarray) -> Tensor:
    """Return the model's inputs of digits whose pixels run from 0 to 16, shape (N, 8, 8)."""
    small = torch.from_numpy(pixels).float().unsqueeze(1)
    large = nn.functional.interpolate(small, size=32, mode="bilinear", align_corners=False)
    return large / 8 - 1  # the backbone was trained on [-1, 1]
