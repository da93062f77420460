"""A node may be restarted during a run, with another budget, other data or another partition."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from flwr.app import Context, Message, RecordDict

from layerfed.config import RunConfig, Scalar
from tests.fakes import Recorded
from tests.tiny_task import configured, run

pytestmark = pytest.mark.usefixtures("tiny_task")

NODE, CLIENT = 3, 1


class Restarting(Recorded):
    """One node is restarted, with other settings, when it is asked to train in round 2."""

    def __init__(
        self, config: RunConfig, settings: dict[str, Scalar], before: dict[str, Scalar]
    ) -> None:
        super().__init__(config, nodes=[{}, before])
        self._settings = settings

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        held = list(messages)
        if any(m.metadata.message_type == "train" and m.metadata.group_id == "2" for m in held):
            old = self._contexts[NODE]
            self._contexts[NODE] = Context(
                old.run_id,
                NODE,
                {**old.node_config, **self._settings},
                RecordDict(),
                old.run_config,
            )
        return super().push_messages(held)


def failures(config: RunConfig, grid: Restarting) -> list[list[str]]:
    """The reasons of each of three rounds."""
    rounds = run(config, rounds=3, grid=grid).rounds
    return [[f.reason for f in record.failures if f.partition == CLIENT] for record in rounds]


def test_a_smaller_budget_costs_one_round(caplog: pytest.LogCaptureFixture) -> None:
    config = configured(
        "budget.kind=per-node", "federation.clients=2", "federation.clients-per-round=2"
    )
    grid = Restarting(config, {"budget": 1}, {"budget": 3})
    grid._contexts[NODE - 1].node_config["budget"] = 2
    with caplog.at_level("INFO", "flwr"):
        first, second, third = failures(config, grid)
    assert not first
    assert "this node's own budget is 1" in second[0]
    assert not third
    assert "node 3 states another budget: 1.0, before 3.0" in caplog.text


def test_another_partition_is_noticed_and_then_taken() -> None:
    config = configured("federation.clients=6", "federation.clients-per-round=5")
    grid = Restarting(config, {"partition-id": 5}, {})
    del grid._contexts[7]  # the node that held partition 5
    first, second, third = failures(config, grid)
    assert not first
    assert "this node holds partition 5, and client 1 is asked" in second[0]
    assert not third
    described = [r for m, r in grid.replies if m.metadata.message_type == "query.describe"]
    held = [r.content.metric_records["metrics"]["partition"] for r in described]
    assert held[-1] == 5


def test_more_examples_are_noticed_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a secure sum, where a count that is too high would end the run."""
    config = configured(
        "secagg.enabled=true", "strategy.name=top", "federation.clients-per-round=0"
    )
    grid = Restarting(config, {}, {})
    from layerfed.client.workbench import Workbench

    examples = Workbench.examples

    def grown(bench: Workbench, partition: int):  # type: ignore[no-untyped-def]
        if grid.kinds() and (2, "train") in grid.kinds() and partition == CLIENT:
            return examples(bench, 5)
        return examples(bench, partition)

    monkeypatch.setattr(Workbench, "examples", grown)
    first, second, third = failures(config, grid)
    assert not first
    assert "this node has 30 examples, and stated 14 when it joined" in second[0]
    assert not third
