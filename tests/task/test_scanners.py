"""Scanners: the digits of `digits`, as each client's make delivers them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerfed.config import ConfigError, load_config
from layerfed.task import Task, load_task
from layerfed.task.scanners import MAKES, NOISE


def task(*settings: str, name: str = "scanners") -> Task:
    return load_task(load_config(None, [f"task.name={name}", *settings]))


def test_a_client_has_the_digits_of_the_plain_task_by_its_own_make() -> None:
    ours, plain = task(), task(name="digits")
    for client in range(10):
        own, digits = ours.partition(client), plain.partition(client)
        np.testing.assert_array_equal(own.column("label"), digits.column("label"))
        assert set(own.column("group")) == {client % 5}
        assert list(ours.groups_of(own)[ours.groups[client % 5]]) == list(range(len(own)))
    clean, plain_images = ours.partition(0).column("image"), plain.partition(0).column("image")
    np.testing.assert_array_equal(clean, plain_images)


def test_every_test_digit_comes_from_one_make_in_turn() -> None:
    ours, plain = task().test_examples(), task(name="digits").test_examples()
    np.testing.assert_array_equal(ours.column("group"), np.arange(360) % 5)
    np.testing.assert_array_equal(ours.column("label"), plain.column("label"))
    images, clean = ours.column("image"), plain.column("image")
    np.testing.assert_array_equal(images[0::5], clean[0::5])
    np.testing.assert_array_equal(images[1::5], -clean[1::5])
    np.testing.assert_array_equal(images[3::5], np.rot90(clean[3::5], axes=(2, 3)))


def test_blur_keeps_the_mean_and_takes_detail_and_noise_has_its_deviation() -> None:
    images = torch.zeros(1, 1, 32, 32)
    images[0, 0, 16, 16] = 1.0
    blurred = MAKES["blurred"](images)
    assert blurred.sum() == pytest.approx(1.0)
    reach = torch.arange(32).sub(16.0).square()
    along = blurred[0, 0].sum(0)
    assert float((along * reach).sum().sqrt()) == pytest.approx(2.5, abs=0.05)
    noisy = MAKES["noisy"](torch.zeros(40, 1, 32, 32))
    assert noisy.abs().max() <= 1
    inside = noisy[noisy.abs() < 1]
    # A normal variable cut off at 1 / 0.6 standard deviations.
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(1)) * NOISE
    assert float(inside.std()) == pytest.approx(float(normal[normal.abs() < 1].std()), abs=0.01)
    assert torch.equal(noisy, MAKES["noisy"](torch.zeros(40, 1, 32, 32)))


def test_makes_are_no_column_to_partition_by() -> None:
    with pytest.raises(ConfigError, match="by-column"):
        task("task.partition=by-column").partition(0)
