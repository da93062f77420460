"""Clipping and noise against their definitions; comparisons of figures use repeatable entropy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from layerfed.config import ConfigError, NodeConfig, PrivacyConfig
from layerfed.exchange.clipping import norm_of
from layerfed.models.layers import LayerMap
from layerfed.privacy.protection import Protection, add_noise, gaussian, refuse_buffers
from tests.conftest import TinyNet
from tests.updates import UPDATES

SAMPLES = 200_000


def repeatable(seed: int = 0) -> Callable[[int], bytes]:
    return np.random.default_rng(seed).bytes


def node(**settings: float) -> NodeConfig:
    return NodeConfig(partition_id=0, **settings)  # type: ignore[arg-type]


def test_draws_are_standard_normal() -> None:
    """Moments, tails and independence, each within five standard errors."""
    drawn = gaussian(SAMPLES, repeatable())
    error = 5 / math.sqrt(SAMPLES)
    assert drawn.shape == (SAMPLES,)
    assert abs(drawn.mean()) < error
    assert abs(drawn.var() - 1) < error * math.sqrt(2)
    assert abs((drawn**4).mean() - 3) < error * math.sqrt(96)
    for bound in (1.0, 2.0, 3.0):
        expected = math.erfc(bound / math.sqrt(2))
        assert abs((np.abs(drawn) > bound).mean() - expected) < error * math.sqrt(expected)
    # Both numbers of a pair, and neighbours.
    half = SAMPLES // 2
    assert abs((drawn[:half] * drawn[half:]).mean()) < 5 / math.sqrt(half)
    assert abs((drawn[1:] * drawn[:-1]).mean()) < error


def test_draws_are_finite_whatever_the_entropy() -> None:
    assert np.isfinite(gaussian(3, lambda count: bytes(count))).all()
    assert np.isfinite(gaussian(3, lambda count: b"\xff" * count)).all()


def test_noise_is_not_that_of_any_seed() -> None:
    np.random.seed(0)
    first = gaussian(8)
    np.random.seed(0)
    assert not np.array_equal(first, gaussian(8))


def test_noise_has_the_standard_deviation_asked_for() -> None:
    total = np.full((400, 500), 3.0)
    add_noise(total, 0.25, repeatable())
    assert abs(total.mean() - 3.0) < 5 * 0.25 / math.sqrt(SAMPLES)
    assert total.std() == pytest.approx(0.25, rel=5 / math.sqrt(2 * SAMPLES))


@given(UPDATES, st.floats(1e-3, 1e3))
def test_without_noise_an_update_is_clipped_as_a_whole(
    update: dict[str, np.ndarray], clip: float
) -> None:
    sent = Protection(clip=clip).update(update)
    assert norm_of(sent) <= clip * (1 + 1e-5)
    assert sent.keys() == update.keys()


def test_noise_on_an_update_is_that_multiple_of_the_bound() -> None:
    update = {"a": np.full((300, 400), 1e3, np.float32), "b": np.zeros(1000, np.float32)}
    sent = Protection(clip=2.0, noise=1.5).update(update, repeatable())
    clipped = Protection(clip=2.0).update(update)
    for name in update:
        assert sent[name].dtype == np.float32
        noise = sent[name].astype(np.float64) - clipped[name]
        assert noise.std() == pytest.approx(3.0, rel=5 / math.sqrt(2 * noise.size))
    # Nothing was added to what the caller holds.
    assert (update["b"] == 0).all()


def test_statistics_are_clipped_noised_and_not_negative() -> None:
    row = [3.0, 4.0, *[0.0] * 998]
    sent = Protection(clip=1, statistics_clip=0.5, statistics_noise=2.0).statistics(
        {"grad_norm_sq": row, "param_norm_sq": row}, ["param_norm_sq"], repeatable()
    )
    assert sent["param_norm_sq"] == row  # of the model alone
    found = np.array(sent["grad_norm_sq"])
    assert (found >= 0).all()
    # Half of N(0, 1) is cut off: what is left has E x² = σ²/2.
    assert (found[2:] ** 2).mean() == pytest.approx(0.5, rel=0.25)
    assert (found[2:] == 0).mean() == pytest.approx(0.5, abs=0.1)


def test_clipped_statistics_keep_their_direction() -> None:
    tiny_noise = Protection(clip=1, statistics_clip=0.5, statistics_noise=1e-9)
    sent = tiny_noise.statistics({"snr": [3.0, 4.0]})
    assert sent["snr"] == pytest.approx([0.3, 0.4], abs=1e-6)
    assert Protection(clip=1).statistics({"snr": [3.0, 4.0]}) == {"snr": [3.0, 4.0]}


def test_run_and_node_ask_for_nothing() -> None:
    assert Protection.of(PrivacyConfig(), node()) is None


@pytest.mark.parametrize(
    ("run", "own", "expected"),
    [
        ({"mode": "central", "clip": 2, "noise": 1.0}, {}, Protection(2, 0, 0, 0, True)),
        ({"mode": "local", "clip": 2, "noise": 1.0}, {}, Protection(2, 1, 0, 0, True)),
        ({}, {"privacy_clip": 3, "privacy_noise": 0.5}, Protection(3, 0.5)),
        ({}, {"privacy_clip": 3}, Protection(3)),
        (
            {"mode": "local", "clip": 2, "noise": 1.0},
            {"privacy_clip": 3, "privacy_noise": 4.0},
            Protection(2, 4, 0, 0, True),
        ),
        (
            {"mode": "local", "clip": 2, "noise": 1.0},
            {"privacy_clip": 1, "privacy_noise": 0.5},
            Protection(1, 1, 0, 0, True),
        ),
        (
            {"mode": "central", "clip": 2, "statistics_clip": 4, "statistics_noise": 1},
            {"privacy_statistics_clip": 3, "privacy_statistics_noise": 0.5},
            Protection(2, 0, 3, 1, True),
        ),
        (
            {},
            {"privacy_statistics_clip": 3, "privacy_statistics_noise": 0.5},
            Protection(math.inf, 0, 3, 0.5),
        ),
    ],
)
def test_of_run_and_node_the_stricter_holds(
    run: dict[str, object], own: dict[str, float], expected: Protection
) -> None:
    assert Protection.of(PrivacyConfig.model_validate(run), node(**own)) == expected


def test_a_model_with_buffers_in_trained_layers_is_refused() -> None:
    model = TinyNet()
    with pytest.raises(
        ConfigError, match=r"'blocks.0.norm.num_batches_tracked' of layer 'blocks.0'"
    ):
        refuse_buffers(LayerMap.from_model(model))
    for block in model.blocks:
        block.norm = nn.LayerNorm(6)
    refuse_buffers(LayerMap.from_model(model))
