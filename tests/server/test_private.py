"""Central differential privacy as a step: bounded shares, equal weights, noise on sums."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from torch import nn

from layerfed.exchange import TrainInstruction
from layerfed.exchange.clipping import norm_of
from layerfed.models.layers import LayerMap
from layerfed.runs.records import RoundRecord
from layerfed.server.aggregation import MaskedMean
from layerfed.server.private import CentralNoise
from layerfed.server.steps import Arrival
from tests.conftest import TinyNet


def plain_net() -> nn.Module:
    model = TinyNet()
    for block in model.blocks:
        block.norm = nn.LayerNorm(6)
    return model


LAYERS = LayerMap.from_model(plain_net())
RECORD = RoundRecord(1)


def update(layers: list[str], value: float) -> dict[str, np.ndarray]:
    return {
        tensor: np.full(LAYERS.shapes[tensor], value, np.float32)
        for layer in layers
        for tensor in LAYERS[layer].tensors
    }


def arrived(step: CentralNoise, layers: list[str], value: float, examples: int) -> Arrival:
    asked: Any = {layer: {} for layer in layers}
    found = Arrival(0, None, TrainInstruction(1, ()), asked, examples)  # type: ignore[arg-type]
    found.update, found.examples = update(layers, value), examples
    step.receive(found, RECORD)
    found.examples = step.weigh(found.examples)
    return found


def mean_of(step: CentralNoise, *replies: tuple[list[str], float, int]) -> MaskedMean:
    mean = MaskedMean(LAYERS)
    for layers, value, examples in replies:
        found = arrived(step, layers, value, examples)
        mean.add(layers, found.update, found.examples)
    step.close(mean.sums, RECORD)
    return mean


def test_no_client_moves_the_sums_by_more_than_the_bound() -> None:
    """The bound is on all layers together, for any update and any number of examples."""
    mean = mean_of(CentralNoise(clip=0.5, noise=0.0), (["blocks.1", "head"], 1e6, 2**29))
    assert mean.weights == {"blocks.1": 1, "head": 1}
    found = {**mean.pop("blocks.1"), **mean.pop("head")}
    assert norm_of(found) == pytest.approx(0.5, rel=1e-5)


def test_every_client_weighs_the_same_and_small_updates_stay() -> None:
    mean = mean_of(
        CentralNoise(clip=1e3, noise=0.0),
        (["blocks.0", "head"], 1.0, 1),
        (["head"], 4.0, 1000),
    )
    assert all((tensor == 2.5).all() for tensor in mean.pop("head").values())
    assert all((tensor == 1.0).all() for tensor in mean.pop("blocks.0").values())


def test_noise_is_on_the_sums_of_trained_layers_once() -> None:
    """Ten clients on the head, one on a block: the mean's noise is a tenth there, all of it here."""
    heads, blocks = [], []
    random = np.random.default_rng(0)
    for _ in range(300):
        replies = [
            (["blocks.2", "head"] if client == 0 else ["head"], 0.0, 1) for client in range(10)
        ]
        mean = mean_of(CentralNoise(2.0, 1.5, random.bytes), *replies)
        assert set(mean.weights) == {"blocks.2", "head"}
        heads += [t.ravel() for t in mean.pop("head").values()]
        blocks += [t.ravel() for t in mean.pop("blocks.2").values()]
    for found, std in ((np.concatenate(heads), 0.3), (np.concatenate(blocks), 3.0)):
        assert abs(found.mean()) < 5 * std / math.sqrt(found.size)
        assert found.std() == pytest.approx(std, rel=5 / math.sqrt(2 * found.size))


def test_norms_without_noise_stay_unknown() -> None:
    assert not arrived(CentralNoise(1.0, 1.0), ["head"], 1.0, 1).measured
