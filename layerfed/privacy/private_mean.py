"""Central differential privacy: a mean to which no client can add more than its share, with noise."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from layerfed.exchange.clipping import clipped
from layerfed.models.layers import LayerMap
from layerfed.privacy.protection import Entropy, add_noise
from layerfed.server.aggregation import Aggregation, MaskedMean

__all__ = ["PrivateAggregation", "PrivateMean"]


class PrivateMean(MaskedMean):
    """The mean of clipped updates, each of the same weight, with Gaussian noise on their sums.

    What a client adds to the sums of all layers together has a norm of at most C, whatever it sends and
    however many examples it states; exchanging its data for others moves them by at most 2C. The sum of
    each layer that anybody trained gets N(0, (z·C)²) in each coordinate before it is divided by the
    number of those who did, which masks and replies say, and no update does.

    Parameters
    ----------
    layers : LayerMap
    clip : float
        C.
    noise : float
        z.
    entropy : Callable[[int], bytes]
        Where noise comes from.
    """

    def __init__(
        self, layers: LayerMap, *, clip: float, noise: float, entropy: Entropy = os.urandom
    ) -> None:
        super().__init__(layers)
        self._clip, self._std, self._entropy = clip, noise * clip, entropy

    def add(
        self, trained: Iterable[str], update: Mapping[str, np.ndarray], examples: int
    ) -> dict[str, float]:
        """Clip one client's update and fold it in; its norms stay unknown, since they have no noise."""
        super().add(trained, clipped(update, self._clip)[0], 1)
        return {}

    def norm_sq(self, layer: str) -> None:
        """Return None: next to the norms of updates, which stay unknown, it says nothing."""
        return

    def close(self) -> None:
        """Add the noise, once."""
        for total in self._sums.values():
            add_noise(total, self._std, self._entropy)
        self._std = 0.0


@dataclass(frozen=True)
class PrivateAggregation(Aggregation):
    """Averages with central differential privacy.

    Attributes
    ----------
    bound : float
        C. Not `clip`, which counts in the record how many updates exceed it, without noise.
    noise : float
        z.
    """

    bound: float = 1.0
    noise: float = 0.0

    def begin(self, layers: LayerMap) -> PrivateMean:
        """Return what takes one round's updates in."""
        return PrivateMean(layers, clip=self.bound, noise=self.noise)

    def counted(self, examples: int) -> int:
        """Count every client alike."""
        return 1
