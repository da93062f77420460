"""Clipping and Gaussian noise on updates and statistics, for differential privacy.

Noise comes from the operating system's entropy and never from the run's seed: everyone who knows the
seed could subtract it. Noise is drawn and added in float64, and only the sum is rounded to the tensor's
own type. Gaussian noise in floating point is still not the ideal one (Mironov, *On significance of the
least significant bits for differential privacy*, 2012), and no ε here accounts for the difference.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layerfed.config import ConfigError, NodeConfig, PrivacyConfig
from layerfed.exchange.clipping import clipped
from layerfed.exchange.pieces import pieces
from layerfed.models.layers import LayerMap

__all__ = ["Entropy", "Protection", "add_noise", "gaussian", "refuse_buffers"]

Entropy = Callable[[int], bytes]


def gaussian(count: int, entropy: Entropy = os.urandom) -> np.ndarray:
    """Draw numbers from N(0, 1), shape (count,), float64 (Box and Muller, 1958).

    Parameters
    ----------
    count : int
    entropy : Callable[[int], bytes]
        Returns a number of random bytes. The default is the operating system's, which is fit for
        cryptography; numpy's generators are not.
    """
    pairs = -(-count // 2)
    words = np.frombuffer(entropy(16 * pairs), dtype=np.uint64).reshape(2, pairs)
    # 53 bits each, in (0, 1]: zero has no logarithm.
    first, second = ((words >> np.uint64(11)) + np.uint64(1)) * 2.0**-53
    radius, angle = np.sqrt(-2.0 * np.log(first)), 2.0 * math.pi * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def add_noise(total: np.ndarray, std: float, entropy: Entropy = os.urandom) -> None:
    """Add N(0, std²) to each element of a contiguous float64 array, in place."""
    for piece in pieces(total) if std > 0 else ():
        piece += std * gaussian(piece.size, entropy)


def refuse_buffers(layers: LayerMap) -> None:
    """Refuse a model whose trained layers hold more than parameters.

    Raises
    ------
    ConfigError
        If there is such a tensor; the message names the first. A counter of batches would be sent
        without clipping and noise, and a running variance with noise may be negative.
    """
    for layer in (*layers.blocks, layers.head):
        buffers = sorted(set(layer.sent) - set(layer.parameters))
        if buffers and layer.name not in layers.personal:
            raise ConfigError(
                f"differential privacy does not go with this model: '{buffers[0]}' of layer "
                f"'{layer.name}' is no parameter but a buffer (BatchNorm's statistics, a counter), "
                "which noise would spoil, and which reveals something of the data without noise; use a "
                "model with LayerNorm or GroupNorm, or privacy.mode=none"
            )


@dataclass(frozen=True)
class Protection:
    """The clipping and noise on everything that a client sends.

    Attributes
    ----------
    clip : float
        C, the largest L2 norm of an update.
    noise : float
        z: N(0, (z·C)²) is added to each coordinate of it.
    statistics_clip, statistics_noise : float
        The same for each statistic of a probe; 0 leaves statistics as they are.
    hides_examples : bool
        Whether the client always states one example.
    """

    clip: float
    noise: float = 0.0
    statistics_clip: float = 0.0
    statistics_noise: float = 0.0
    hides_examples: bool = False

    @classmethod
    def of(cls, run: PrivacyConfig, node: NodeConfig) -> Protection | None:
        """Return the protection that the run and the node ask for, or None if neither asks for any.

        Of two bounds the lower one holds; of two noise multipliers the higher one.
        """
        private, local = run.mode != "none", run.mode == "local"
        bounds = [run.clip] if private else []
        bounds += [node.privacy_clip] if node.privacy_clip else []
        of_statistics = [
            bound for bound in (run.statistics_clip, node.privacy_statistics_clip) if bound
        ]
        if not bounds and not of_statistics:
            return None
        return cls(
            clip=min(bounds, default=math.inf),
            noise=max(run.noise if local else 0.0, node.privacy_noise),
            statistics_clip=min(of_statistics, default=0.0),
            statistics_noise=max(run.statistics_noise, node.privacy_statistics_noise),
            hides_examples=private,
        )

    def update(
        self, update: Mapping[str, np.ndarray], entropy: Entropy = os.urandom
    ) -> Mapping[str, np.ndarray]:
        """Clip the whole update to one norm, and add the noise."""
        update, _ = clipped(update, self.clip)
        if self.noise == 0:
            return update
        sent = {}
        for name, values in update.items():
            noised = np.array(values, dtype=np.float64, order="C")
            add_noise(noised, self.noise * self.clip, entropy)
            sent[name] = noised.astype(values.dtype)
        return sent

    def statistics(
        self,
        statistics: Mapping[str, Sequence[float]],
        public: Collection[str] = (),
        entropy: Entropy = os.urandom,
    ) -> dict[str, list[float]]:
        """Clip each statistic that is not public, add the noise, and set negative values to 0."""
        if self.statistics_clip == 0:
            return {name: list(row) for name, row in statistics.items()}
        sent = {}
        for name, row in statistics.items():
            values = np.array(row, dtype=np.float64)
            if name not in public:
                values = np.array(clipped({name: values}, self.statistics_clip)[0][name])
                add_noise(values, self.statistics_noise * self.statistics_clip, entropy)
            sent[name] = np.maximum(values, 0.0).tolist()
        return sent
