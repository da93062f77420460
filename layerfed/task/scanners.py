"""Digits as five makes of scanner deliver them: clients that differ in input, as devices do.

The digits are those of `digits`, and so are labels and model. Client i has make i mod 5, and its images
are inverted, out of focus, turned, or full of noise, beside clean ones. A change of the input asks other
layers of a network to move than a change of the labels does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from layerfed.config import RunConfig
from layerfed.task.base import Examples
from layerfed.task.digits import Digits

# Standard deviations of the blur, in pixels of 32, and of the noise, for values in [-1, 1].
BLUR, NOISE = 2.5, 0.6


def _blurred(images: Tensor) -> Tensor:
    reach = round(3 * BLUR)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / BLUR).square())
    weights /= weights.sum()
    padded = nn.functional.pad(images, (reach,) * 4, mode="replicate")
    rows = nn.functional.conv2d(padded, weights.view(1, 1, 1, -1))
    return nn.functional.conv2d(rows, weights.view(1, 1, -1, 1))


def _noisy(images: Tensor) -> Tensor:
    # The noise belongs to the data, and is the same for every seed of a run.
    drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + NOISE * drawn).clamp(-1, 1)


MAKES: dict[str, Callable[[Tensor], Tensor]] = {
    "clean": lambda images: images,
    "inverted": torch.neg,
    "blurred": _blurred,
    "turned": lambda images: images.rot90(1, (2, 3)),
    "noisy": _noisy,
}
"""What each make of scanner does to images of shape (N, 1, 32, 32) with values in [-1, 1]."""


class Scanners(Digits):
    """Digits from five makes of scanner; each test digit comes from one of them, in turn."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        train, test = (
            {name: torch.from_numpy(held.column(name)) for name in ("image", "label")}
            for held in (self._train, self._test)
        )
        self._of_make = len(self._train)
        count = len(MAKES)
        self._train = Examples.of(
            {
                "image": torch.cat([deliver(train["image"]) for deliver in MAKES.values()]),
                "label": train["label"].repeat(count),
                "group": torch.arange(count).repeat_interleave(self._of_make),
            }
        )
        makes = torch.arange(len(self._test)) % count
        delivered = torch.stack([deliver(test["image"]) for deliver in MAKES.values()])
        self._test = Examples.of(
            {
                "image": delivered[makes, torch.arange(len(makes))],
                "label": test["label"],
                "group": makes,
            }
        )

    @property
    def groups(self) -> tuple[str, ...]:
        """The makes of scanner."""
        return tuple(MAKES)

    @cached_property
    def _indices(self) -> list[np.ndarray]:
        return [
            digits + self._of_make * (client % len(MAKES))
            for client, digits in enumerate(super()._indices)
        ]
