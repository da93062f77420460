"""A pass has each example once, and no batch of one where there are others."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from layerfed.config import ConfigError
from layerfed.task.base import Examples

CPU = torch.device("cpu")


def one_pass(count: int, size: int, seed: int = 0) -> list[list[int]]:
    examples = Examples.of({"x": torch.arange(count)})
    batches = examples.shuffled(size, CPU, np.random.default_rng(seed))
    return [b["x"].tolist() for b in islice(batches, max(1, -(-count // size)))]


@pytest.mark.parametrize("size", [2, 3, 4, 16])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 16, 17, 18, 33])
def test_no_batch_is_of_one_and_none_is_larger_than_asked(count: int, size: int) -> None:
    found = one_pass(count, size)
    assert all(1 < len(batch) <= size for batch in found)
    times = Counter(x for batch in found for x in batch)
    assert times.keys() == set(range(count))
    twice = size == 2 and count % 2 == 1
    assert times.total() == count + twice


@pytest.mark.parametrize(("count", "size"), [(16, 16), (18, 16), (5, 8), (1, 8), (3, 1)])
def test_other_passes_are_slices_of_the_order(count: int, size: int) -> None:
    order = np.random.default_rng(0).permutation(count).tolist()
    assert one_pass(count, size) == [order[i : i + size] for i in range(0, count, size)]


def test_no_examples_are_refused_and_not_waited_for() -> None:
    with pytest.raises(ConfigError, match="there is no example to train on"):
        one_pass(0, 4)
