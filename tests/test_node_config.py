"""What a node says of itself is checked when it is read."""

from __future__ import annotations

import pytest

from layerfed.config import ConfigError
from layerfed.node_config import NodeConfig


def test_settings_are_read() -> None:
    node = NodeConfig.read({"partition-id": 1, "num-partitions": 4, "budget": 2})
    assert (node.partition_id, node.num_partitions, node.budget) == (1, 4, 2.0)


def test_only_the_partition_is_needed() -> None:
    node = NodeConfig.read({"partition-id": 0})
    assert node.num_partitions is None
    assert node.budget is None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "no partition"),
        ({"partition-id": -1}, "partition-id = -1"),
        ({"partition-id": 0, "budget": -2.0}, "budget = -2.0"),
        ({"partition-id": 0, "budget": float("inf")}, "budget = inf"),
        ({"partition-id": 0, "bugdet": 2}, "unknown key 'bugdet'; known keys: partition-id"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match="node") as caught:
        NodeConfig.read(settings)
    assert told in str(caught.value)
