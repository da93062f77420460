"""The numbers of a round's clients are combined as they are declared."""

from __future__ import annotations

import pytest
import torch

from layerfed.exchange.metrics import METRICS, Numbers, Work


def test_sums_maxima_and_means_weighted_by_examples() -> None:
    numbers = Numbers()
    numbers.add(7, "train", {"train_loss": 2.0, "flops": 5.0, "peak_memory": 8.0}, 30)
    numbers.add(2, "train", {"train_loss": 4.0, "flops": 6.0, "peak_memory": 9.0}, 10)
    numbers.add(2, "evaluate", {"client_accuracy": 0.5, "train_loss": 99.0}, 4)
    numbers.add(5, "train", {"nobody_declared": 1.0}, 1000)
    combined = numbers.combined()
    assert combined["train_loss"] == pytest.approx((30 * 2.0 + 10 * 4.0) / 40)
    assert (combined["flops"], combined["peak_memory"]) == (11.0, 9.0)
    assert combined["client_accuracy"] == 0.5
    # Stated by nobody.
    assert (combined["client_loss"], combined["flops_probe"]) == (None, 0.0)
    assert combined["peak_memory_probe"] == 0.0
    assert combined.keys() == METRICS.keys()


def test_a_private_reply_states_public_numbers_only() -> None:
    work = Work("train", torch.device("cpu"), flops=3.0, steps=2, loss=0.5)
    stated = work.numbers(private=False)
    assert stated["train_loss"] == 0.5
    assert stated["steps"] == 2.0
    assert work.numbers(private=True) == {"flops": 3.0, "simulated_seconds": 0.0}
