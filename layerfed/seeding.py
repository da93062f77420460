"""Every random choice of a run comes from its one seed, through a stream of its own.

Streams are keyed by purpose and by what they serve (round, partition id), never by order of use, so a
draw does not depend on who was sampled before, on Flower's random node ids, or on the engine.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

__all__ = ["Stream", "generator", "torch_seed"]


class Stream(IntEnum):
    """Purposes with a random stream of their own. Values are part of a run's identity: append only."""

    SAMPLING = 1
    PARTITION = 2
    BUDGET = 3
    HEAD = 4
    TRAIN = 5
    PROBE = 6
    MASK = 7
    LOCAL_TEST = 8


def generator(seed: int, stream: Stream, *keys: int) -> np.random.Generator:
    """Return the generator of a stream, e.g. `generator(seed, Stream.TRAIN, round, partition)`."""
    return np.random.default_rng((seed, int(stream), *keys))


def torch_seed(seed: int, stream: Stream, *keys: int) -> int:
    """Return a seed for torch's own generators, derived like `generator`."""
    return int(generator(seed, stream, *keys).integers(2**63 - 1))
