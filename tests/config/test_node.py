"""A node's settings are checked when they are read."""

from __future__ import annotations

import pytest

from layerfed.config import ConfigError, NodeConfig, RunConfig


def test_settings_are_read() -> None:
    node = NodeConfig.read(
        {
            "partition-id": 1,
            "num-partitions": 4,
            "budget": 2,
            "budget-unit": "flops",
            "device": "cuda:1",
            "threads": 2,
            "max-step-seconds": 3,
        }
    )
    assert (node.partition_id, node.num_partitions) == (1, 4)
    assert (node.budget, node.budget_unit) == (2, "flops")
    assert (node.device, node.threads, node.max_step_seconds) == ("cuda:1", 2, 3)


def test_a_folder_may_be_called_by_a_number() -> None:
    node = NodeConfig.read({"partition-id": 0, "own-data": 2024, "store": 2025})
    assert (node.own_data, node.store) == ("2024", "2025")


def test_only_the_partition_is_needed() -> None:
    assert NodeConfig.read({"partition-id": 0}) == NodeConfig(partition_id=0)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "no partition"),
        ({"partition-id": -1}, "partition-id = -1"),
        ({"partition-id": "0"}, "partition-id = '0'"),
        ({"budget": -2.0}, "budget = -2.0 is not allowed: it should be 0 or more, or 'auto'"),
        ({"budget": float("inf")}, "budget = inf"),
        ({"budget": "2"}, "budget = '2'"),
        ({"budget": True}, "budget = True"),
        ({"budget": 2, "budget-unit": "watts"}, "budget-unit = 'watts'"),
        ({"budget": "auto", "budget-unit": "bytes"}, "budget-unit = 'bytes' goes with a number"),
        ({"budget-unit": "bytes"}, "budget-unit = 'bytes' goes with a number"),
        ({"device": "tpu"}, "device = 'tpu'"),
        ({"data": ""}, "data = ''"),
        ({"own-data": ""}, "own-data = ''"),
        ({"data": "a", "own-data": "b"}, "data = 'a' and own-data = 'b': set data if"),
        ({"threads": 0}, "threads = 0"),
        ({"max-step-seconds": 0}, "max-step-seconds = 0"),
        ({"privacy-clip": -1}, "privacy-clip = -1"),
        ({"privacy-noise": 1}, "privacy-noise = 1 is a multiple of privacy-clip"),
        ({"privacy-statistics-clip": 1}, "privacy-statistics-noise = 0 protects nothing"),
        ({"privacy-statistics-noise": 1}, "privacy-statistics-clip = 0 with"),
        ({"bugdet": 2}, "unknown key 'bugdet'; known keys: partition-id"),
        ({"bugdet": 2}, "did you mean budget?"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, object], told: str) -> None:
    if settings:
        settings = {"partition-id": 0, **settings}
    with pytest.raises(ConfigError, match="node") as caught:
        NodeConfig.read(settings)
    assert told in str(caught.value)


def test_a_node_decides_for_itself_what_it_runs_on_and_where_its_data_are() -> None:
    config = RunConfig.from_flat(
        {
            "federation.clients": 2,
            "run.device": "cuda",
            "run.threads": 1,
            "run.seed": 3,
            "task.data": "owner/name",
        }
    )
    settings = {"partition-id": 0, "device": "cpu", "threads": 2, "data": "/srv/rows.csv"}
    found = NodeConfig.read(settings).applied_to(config)
    assert found.run == config.run.model_copy(update={"device": "cpu", "threads": 2})
    assert found.task == config.task.model_copy(update={"data": "/srv/rows.csv"})
    assert NodeConfig.read({"partition-id": 0}).applied_to(config) == config
    own = NodeConfig.read({"partition-id": 0, "own-data": "/srv/own"}).applied_to(config)
    assert own.task.data == "/srv/own"


def test_a_federation_without_a_size_is_cut_as_the_node_says() -> None:
    config = RunConfig()
    settings = {"partition-id": 0, "num-partitions": 3}
    assert NodeConfig.read(settings).applied_to(config).federation.clients == 3
    assert NodeConfig.read(settings).applied_to(config.of_size(4)).federation.clients == 4
    with pytest.raises(ConfigError, match="this node has no num-partitions"):
        NodeConfig.read({"partition-id": 0}).applied_to(config)


def test_a_partition_is_one_of_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"partition-id = 2 .* num-partitions = 2: .* 0 to 1"):
        NodeConfig.read({"partition-id": 2, "num-partitions": 2})
    assert NodeConfig.read({"partition-id": 2, "num-partitions": 2, "own-data": "x"})
