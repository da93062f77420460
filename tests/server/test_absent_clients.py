"""A round goes on with the clients that answer, and layers that no client trained stay the same."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable

from layerfed.client.workbench import workbench
from layerfed.client_app import build_client_app
from layerfed.exchange import instruction
from layerfed.server.transport import exchange
from tests.fakes import Recorded
from tests.tiny_task import configured, run

pytestmark = pytest.mark.usefixtures("tiny_task")


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "yogi"])
def test_a_layer_whose_clients_are_all_gone_stays_bit_identical(optimizer: str) -> None:
    """This holds also if the server's optimiser has momentum from the round before."""
    config = configured(
        "strategy.name=random",
        "federation.clients-per-round=6",
        "federation.min-replies=1",
        f"server.optimizer={optimizer}",
    )
    whole = run(config, rounds=2)
    before = run(config, rounds=1).after
    chosen = whole.masks(2)
    (block, *_), *_ = chosen.values()
    lost = sorted(client for client, blocks in chosen.items() if block in blocks)
    assert len(lost) < len(chosen)

    def gone(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        asked = message.content.config_records["config"]
        if message.metadata.message_type == "train" and asked["round"] == 2:
            mask = asked["mask"]
            assert isinstance(mask, list)
            if mask[block]:
                raise ConnectionError("gone")
        return call_next(message, context)

    found = run(config, rounds=2, grid=Recorded(config, build_client_app([gone])))
    record = found.rounds[1]
    assert sorted(failure.partition for failure in record.failures) == lost
    assert record.replies == len(chosen) - len(lost)
    layers = workbench(config.to_flat()).resident.layers
    others = {b for client, blocks in chosen.items() if client not in lost for b in blocks}
    for number, layer in enumerate(layers.blocks):
        moved = any(not np.array_equal(before[t], found.after[t]) for t in layer.tensors)
        assert moved == (number in others), layer.name
    assert layers.blocks[block].name not in record.moved
    assert "head" in record.moved
    assert whole.rounds[1].moved != record.moved


# -------------------------------------------------------------------------------------- the clock
class Silent(Recorded):
    """A grid on which no client answers."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return []


@pytest.mark.parametrize("jump", [86_400.0, -86_400.0])
def test_a_wait_ends_in_time_when_the_clock_is_set(
    jump: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = itertools.count(2e9, jump)
    grid = Silent(configured())
    questions = [
        instruction("query.describe", node, server_round=0, timeout=1e7)
        for node in list(grid.get_node_ids())[:2]
    ]
    monkeypatch.setattr(time, "time", lambda: next(now))
    began = time.monotonic()
    found = [reply.error.reason for reply in exchange(grid, questions, 0.3)]
    assert found == ["no reply in time"] * 2
    assert time.monotonic() - began >= 0.3


def test_a_clock_that_is_set_again_and_again_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configured("strategy.name=ilp")
    whole = run(config, rounds=2)
    jumps = itertools.cycle([0.0, 86_400.0, -86_400.0])
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    found = run(config, rounds=2)
    for name, tensor in whole.after.items():
        np.testing.assert_array_equal(found.after[name], tensor)
    assert [r.failures for r in found.rounds] == [[], []]
    assert all(0 <= r.seconds < 60 for r in found.rounds)
