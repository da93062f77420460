"""The mean of central differential privacy: bounded shares, equal weights, noise on sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
from torch import nn

from layerfed.exchange.clipping import norm_of
from layerfed.models.layers import LayerMap
from layerfed.privacy.private_mean import PrivateMean
from tests.conftest import TinyNet


def plain_net() -> nn.Module:
    model = TinyNet()
    for block in model.blocks:
        block.norm = nn.LayerNorm(6)
    return model


LAYERS = LayerMap.from_model(plain_net())


def update(layers: list[str], value: float) -> dict[str, np.ndarray]:
    return {
        tensor: np.full(LAYERS.shapes[tensor], value, np.float32)
        for layer in layers
        for tensor in LAYERS[layer].tensors
    }


def test_no_client_moves_the_sums_by_more_than_the_bound() -> None:
    """All layers together, whatever it sends and however many examples it states."""
    mean = PrivateMean(LAYERS, clip=0.5, noise=0.0)
    sent = update(["blocks.1", "head"], 1e6)
    mean.add(["blocks.1", "head"], sent, 2**29)
    mean.close()
    assert mean.weights == {"blocks.1": 1, "head": 1}
    found = {**mean.pop("blocks.1"), **mean.pop("head")}
    assert norm_of(found) == pytest.approx(0.5, rel=1e-5)


def test_every_client_weighs_the_same_and_small_updates_stay() -> None:
    mean = PrivateMean(LAYERS, clip=1e3, noise=0.0)
    mean.add(["blocks.0", "head"], update(["blocks.0", "head"], 1.0), 1)
    mean.add(["head"], update(["head"], 4.0), 1000)
    mean.close()
    assert all((tensor == 2.5).all() for tensor in mean.pop("head").values())
    assert all((tensor == 1.0).all() for tensor in mean.pop("blocks.0").values())


def test_noise_is_on_the_sums_of_trained_layers_once() -> None:
    """Ten clients on the head, one on a block: the mean's noise is a tenth there, all of it here."""
    heads, blocks = [], []
    random = np.random.default_rng(0)
    for _ in range(300):
        mean = PrivateMean(LAYERS, clip=2.0, noise=1.5, entropy=random.bytes)
        for client in range(10):
            trained = ["blocks.2", "head"] if client == 0 else ["head"]
            mean.add(trained, update(trained, 0.0), 1)
        mean.close()
        mean.close()
        assert set(mean.weights) == {"blocks.2", "head"}
        heads += [t.ravel() for t in mean.pop("head").values()]
        blocks += [t.ravel() for t in mean.pop("blocks.2").values()]
    for found, std in ((np.concatenate(heads), 0.3), (np.concatenate(blocks), 3.0)):
        assert abs(found.mean()) < 5 * std / math.sqrt(found.size)
        assert found.std() == pytest.approx(std, rel=5 / math.sqrt(2 * found.size))


def test_norms_without_noise_stay_unknown() -> None:
    mean = PrivateMean(LAYERS, clip=1.0, noise=1.0)
    assert mean.add(["head"], update(["head"], 1.0), 1) == {}
