"""Settings that secure aggregation cannot work with are refused at once, with advice."""

from __future__ import annotations

import pytest

from layerfed.config import ConfigError, SecAggConfig, load_config, refuse_with_secagg
from layerfed.strategies import checked

TOP = "strategy.name=top"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["exchange.codec=int8"], ["exchange.codec = 'int8'", "exchange.codec=float32"]),
        (["strategy.name=random"], ["strategy.name = 'random'", "layers of its own", "use top"]),
        (["strategy.name=snr"], ["strategy.name = 'snr'", "layers of its own"]),
        (["strategy.name=rgn"], ["strategy.name = 'rgn'", "layers of its own"]),
        (
            ["strategy.name=fedtlu", "strategy.side=client"],
            ["strategy.name = 'fedtlu'", "side=server"],
        ),
        (
            ["strategy.name=ilp"],
            ["strategy.name = 'ilp'", "strategy.consistency=100"],
        ),
        (
            ["strategy.name=ilp", "strategy.consistency=0"],
            ["strategy.name = 'ilp'", "ilp with a large consistency"],
        ),
        (["strategy.name=ilp", "strategy.consistency=-1.0"], ["strategy.name = 'ilp'"]),
        ([TOP, "budget.kind=half-normal"], ["budget.kind = 'half-normal'", "'top'", "identical"]),
        (
            ["strategy.name=cyclic", "budget.kind=per-node"],
            ["budget.kind = 'per-node'", "'cyclic'"],
        ),
        ([TOP, "federation.clients-per-round=2"], ["clients-per-round = 2", "at least 3"]),
        (
            [TOP, "federation.clients-per-round=4", "federation.over-provision=1"],
            ["over-provision = 1", "of 8 clients asked", "needs 6", "ends with 4"],
        ),
        ([TOP, "secagg.threshold=0.5"], ["secagg.threshold", "greater than 0.5"]),
        ([TOP, "secagg.range=0"], ["secagg.range", "greater than 0"]),
    ],
)
def test_settings_that_exclude_each_other_are_refused(
    overrides: list[str], says: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(load_config(None, ["secagg.enabled=true", *overrides]))
    message = str(caught.value)
    assert "\n" not in message
    assert [text for text in says if text not in message] == []
    if "secagg.threshold" not in says and "secagg.range" not in says:
        assert "secagg.enabled=false" in message
        checked(load_config(None, overrides))  # without secure aggregation it is fine


@pytest.mark.parametrize(
    "overrides",
    [
        ["strategy.name=ilp", "strategy.consistency=0.1"],
        [TOP],
        ["strategy.name=full", "budget.kind=half-normal"],
        ["strategy.name=ilp", "strategy.consistency=100", "budget.kind=half-normal"],
        [TOP, "budget.kind=half-normal", "budget.min=2", "budget.max=2"],
        ["strategy.name=fedtlu"],
        [TOP, "federation.clients-per-round=8", "federation.over-provision=0.2"],
    ],
)
def test_settings_that_may_work_are_left_to_the_round(overrides: list[str]) -> None:
    assert checked(load_config(None, ["secagg.enabled=true", *overrides])).secagg.enabled


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("server.aggregation", "median", "mean"),
        ("server.clip", 0.5, 0.0),
        ("federation.max-examples", 100, 0),
        ("privacy.mode", "central", "local"),
    ],
)
def test_what_needs_single_updates_is_refused(
    key: str, value: str | float, allowed: str | float
) -> None:
    flat = load_config(None, [TOP]).to_flat()
    refuse_with_secagg({**flat, key: allowed})
    with pytest.raises(ConfigError, match=f"{key} = {value!r} .*needs single updates"):
        refuse_with_secagg({**flat, key: value})


def test_no_more_clients_are_asked_than_there_are() -> None:
    flat = load_config(None, [TOP]).to_flat()
    more = {"federation.over-provision": 0.6, "federation.clients-per-round": 9}
    refuse_with_secagg({**flat, **more, "federation.clients": 10})
    with pytest.raises(
        ConfigError, match=r"of 15 clients asked.* needs 10, and a round ends with 9"
    ):
        refuse_with_secagg({**flat, **more, "federation.clients": 20})


@pytest.mark.parametrize(
    ("threshold", "clients", "needed"),
    [
        (0.66, 3, 3),
        (0.51, 4, 3),
        (0.66, 10, 7),
        (0.66, 20, 14),
        (1.0, 5, 5),
        (0.56, 25, 14),
        (0.55, 100, 55),
    ],
)
def test_the_threshold_is_rounded_up(threshold: float, clients: int, needed: int) -> None:
    assert SecAggConfig(threshold=threshold).needed(clients) == needed
