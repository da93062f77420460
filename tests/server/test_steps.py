"""Steps that would not do what they promise are refused when they are put together."""

from __future__ import annotations

import pytest

from layerfed.config import ConfigError, SecAggConfig
from layerfed.server.aggregation import Aggregation
from layerfed.server.private import CentralNoise
from layerfed.server.secure_sums import SecureSums
from layerfed.server.steps import CappedWeights, Clipping, Decoding, ServerStep
from layerfed.strategies import RoundSettings

NOISE = CentralNoise(1.0, 1.0)


@pytest.mark.parametrize(
    ("steps", "rule", "says"),
    [
        ((NOISE,), "median", "'median' has no sums"),
        ((NOISE, Clipping(1.0)), "mean", "Clipping must not come after it"),
        ((NOISE, CappedWeights(5)), "mean", "CappedWeights must not come after it"),
        ((Clipping(1.0), Decoding()), "mean", "one step reads replies, and it comes first"),
        ((Decoding(), Decoding()), "mean", "one step reads replies"),
        ((SecureSums(SecAggConfig()), Clipping(1.0)), "mean", "sees no single update"),
        ((SecureSums(SecAggConfig()), NOISE), "mean", "sees no single update"),
    ],
)
def test_steps_that_do_not_go_together_are_refused(
    steps: tuple[ServerStep, ...], rule: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        RoundSettings(steps=steps, aggregation=Aggregation(rule))


def test_reading_comes_first_by_itself() -> None:
    kinds = [type(step) for step in RoundSettings(steps=(Clipping(1.0), NOISE)).all_steps]
    assert kinds == [Decoding, Clipping, CentralNoise]
