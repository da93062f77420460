"""Server optimisers against their formulas, written out in float64."""

from __future__ import annotations

import typing

import numpy as np
import pytest

from layerfed.config import ServerConfig
from layerfed.models.layers import LayerMap
from layerfed.server.optimizers import SERVER_OPTIMIZERS
from tests.conftest import TinyNet

LAYERS = LayerMap.from_model(TinyNet())
BLOCK = LAYERS["blocks.1"]
LR, BETA1, BETA2, TAU = 0.5, 0.8, 0.9, 1e-3


def state(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tensors = {name: t.numpy() for name, t in TinyNet().state_dict().items()}
    return {n: (scale * rng.standard_normal(tensors[n].shape)) for n in BLOCK.tensors}


def theta() -> dict[str, np.ndarray]:
    dtypes = {name: t.numpy().dtype for name, t in TinyNet().state_dict().items()}
    return {name: values.astype(dtypes[name]) for name, values in state(0, 10).items()}


def by_formula(name: str, rounds: int) -> np.ndarray:
    weight = "blocks.1.linear.weight"
    x, m, v = theta()[weight].astype(np.float64), np.zeros((6, 6)), np.zeros((6, 6))
    for t in range(rounds):
        delta = state(1 + t, 1e-2)[weight]
        if name == "sgd":
            x = x + LR * delta
        elif name == "momentum":
            m = BETA1 * m + delta
            x = x + LR * m
        else:
            m = BETA1 * m + (1 - BETA1) * delta
            square = delta**2
            if name == "adam":
                v = BETA2 * v + (1 - BETA2) * square
            else:
                v = v - (1 - BETA2) * square * np.sign(v - square)
            x = x + LR * m / (np.sqrt(v) + TAU)
    return x


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_three_rounds_are_those_of_the_formula(name: str) -> None:
    optimizer = SERVER_OPTIMIZERS[name](LR, BETA1, BETA2, TAU)
    tensors = theta()
    for t in range(3):
        tensors = optimizer.step(BLOCK, tensors, state(1 + t, 1e-2))
    np.testing.assert_allclose(
        tensors["blocks.1.linear.weight"], by_formula(name, 3), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_statistics_of_batchnorm_get_the_plain_mean(name: str) -> None:
    mean = state(1)
    mean["blocks.1.norm.num_batches_tracked"] = np.asarray(4.6)
    before = theta()
    after = SERVER_OPTIMIZERS[name](LR, BETA1, BETA2, TAU).step(BLOCK, before, mean)
    for tensor, values in after.items():
        assert values.dtype == before[tensor].dtype
    running = "blocks.1.norm.running_mean"
    np.testing.assert_allclose(after[running], before[running] + mean[running], rtol=1e-6)
    counter = "blocks.1.norm.num_batches_tracked"
    assert after[counter] == before[counter] + 5


def test_the_papers_average_is_the_default() -> None:
    mean, before = state(1), theta()
    after = SERVER_OPTIMIZERS["sgd"]().step(BLOCK, before, mean)
    weight = "blocks.1.linear.weight"
    np.testing.assert_array_equal(after[weight], (before[weight] + mean[weight]).astype(np.float32))


def test_layers_keep_state_of_their_own_that_rests_while_they_do() -> None:
    optimizer = SERVER_OPTIMIZERS["momentum"](LR, BETA1)
    optimizer.step(BLOCK, theta(), state(1))
    moment = optimizer.state["first"]["blocks.1.linear.weight"].copy()
    other = LAYERS["head"]
    zeros = {n: np.zeros(LAYERS.shapes[n], np.float32) for n in other.tensors}
    optimizer.step(other, zeros, {n: np.ones(LAYERS.shapes[n]) for n in other.tensors})
    np.testing.assert_array_equal(optimizer.state["first"]["blocks.1.linear.weight"], moment)
    assert set(optimizer.state["first"]) == {*BLOCK.parameters, *other.parameters}


def test_every_optimizer_can_be_configured() -> None:
    annotation = ServerConfig.model_fields["optimizer"].annotation
    assert set(typing.get_args(annotation)) == set(SERVER_OPTIMIZERS)


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_a_variance_never_becomes_negative(name: str) -> None:
    """A secure sum rounds, and a client may send anything."""
    mean = state(0, 1e-2)
    mean["blocks.1.norm.running_var"] = np.full(6, -99.0)
    stepped = SERVER_OPTIMIZERS[name](LR, BETA1, BETA2, TAU).step(BLOCK, theta(), mean)
    assert (stepped["blocks.1.norm.running_var"] == 0).all()
