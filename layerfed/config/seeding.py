"""Random streams, one for each purpose, all derived from a run's seed.

A stream's key is its purpose, round and partition id, and never the order of use. A draw therefore does
not depend on earlier draws, on Flower's random node ids, or on the engine.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

__all__ = ["Stream", "generator", "torch_seed"]


class Stream(IntEnum):
    """The purposes of random streams. Values are part of a run's identity, so they never change."""

    SAMPLING = 1
    PARTITION = 2
    BUDGET = 3
    HEAD = 4
    TRAIN = 5
    PROBE = 6
    MASK = 7
    LOCAL_TEST = 8
    AUGMENT = 9
    ADAPTERS = 10
    SKIP = 11
    OWN_ADAPTERS = 12


def generator(seed: int, stream: Stream, *keys: int) -> np.random.Generator:
    """Return the generator of a stream, e.g. `generator(seed, Stream.TRAIN, round, partition)`."""
    return np.random.default_rng((seed, int(stream), *keys))


def torch_seed(seed: int, stream: Stream, *keys: int) -> int:
    """Return a seed for torch's own generators, derived like `generator`."""
    return int(generator(seed, stream, *keys).integers(2**63 - 1))
