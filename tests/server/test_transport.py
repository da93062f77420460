"""One node's forged reply never loses another node's reply."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from flwr.app import Message, RecordDict

from layerfed import client_app
from layerfed.exchange import instruction
from layerfed.flower_compat import stamp
from layerfed.grids.inprocess import InProcessGrid
from layerfed.server.transport import exchange
from tests.fakes import PlayedGrid
from tests.tiny_task import configured, run


class Builds(PlayedGrid):
    """Like Flower's grid over HTTP: a pull builds all its replies, which then count as delivered."""

    def __init__(self, unbuildable: dict[int, Exception]) -> None:
        super().__init__()
        self.unbuildable = unbuildable

    def answer(self, message: Message) -> Message:
        if message.metadata.dst_node_id in self.unbuildable:
            raise self.unbuildable[message.metadata.dst_node_id]
        return Message(RecordDict(), reply_to=message)


def questions() -> list[Message]:
    return [instruction("train", node, server_round=1, timeout=60.0) for node in (5, 6, 7)]


@pytest.mark.parametrize(
    "error", [ValueError("bad\nchild"), KeyError("x" * 10_000), RecursionError(), MemoryError()]
)
def test_a_reply_that_cannot_be_built_is_an_error_of_its_node_alone(error: Exception) -> None:
    found = {r.metadata.src_node_id: r for r in exchange(Builds({6: error}), questions(), 5)}
    assert [node for node, reply in found.items() if reply.has_content()] == [5, 7]
    reason = str(found[6].error.reason)
    assert reason.startswith(f"a reply that cannot be read ({type(error).__name__}: ")
    assert reason.isprintable()
    assert len(reason) < 520


def test_a_superlink_that_does_not_answer_is_no_fault_of_a_node() -> None:
    with pytest.raises(httpx.ConnectError):
        list(exchange(Builds({6: httpx.ConnectError("refused")}), questions(), 5))


def test_a_late_reply_that_cannot_be_built_is_forgotten() -> None:
    grid, late = Builds({6: ValueError("no")}), {}
    first = exchange(grid, questions()[:2], 5, late=late)
    assert next(first).metadata.src_node_id == 5
    first.close()
    assert len(late) == 1
    again = exchange(grid, questions()[:1], 5, late=late)
    assert [reply.metadata.src_node_id for reply in again] == [5]
    assert late == {}


def test_what_a_reply_says_it_answers_is_not_believed() -> None:
    """The SuperLink knows to which message a reply belongs; the reply's own statement does not count."""

    class Forging(Builds):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(super().pull_messages(message_ids))
            for reply in replies:
                stamp(reply, reply_to_message_id="m0")
            return replies

    found = [r.metadata.src_node_id for r in exchange(Forging({}), questions(), 5)]
    assert found == [5, 6, 7]


def test_a_grid_whose_pull_waits_is_asked_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Builds):
        waits = True
        pulls = 0

        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            self.pulls += 1
            return super().pull_messages(message_ids) if self.pulls > 5 else []

    def paused(seconds: float) -> None:
        raise AssertionError(f"paused for {seconds} s")

    monkeypatch.setattr("layerfed.server.transport.time.sleep", paused)
    found = exchange(Slow({}), questions(), 5)
    assert sorted(reply.metadata.src_node_id for reply in found) == [5, 6, 7]
    grid = Slow({})
    grid.waits = False
    with pytest.raises(AssertionError, match="paused"):
        list(exchange(grid, questions(), 5))


def test_each_reply_is_told_with_the_number_of_those_asked() -> None:
    told: list[tuple[int, int]] = []
    replies = exchange(Builds({}), questions(), 5, replied=lambda *counts: told.append(counts))
    assert told == []
    next(replies)
    assert told == [(1, 3)]
    assert len(list(replies)) == 2
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.usefixtures("tiny_task")
def test_an_update_is_freed_before_the_next_client_works(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Message]] = []
    alive: list[int] = []
    reply = client_app.train_reply

    def counted(*given: Any, **numbers: Any) -> Message:
        alive.append(sum(message() is not None for message in made))
        found = reply(*given, **numbers)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(client_app, "train_reply", counted)
    config = configured()
    run(
        config,
        grid=InProcessGrid(client_app.client_app, config.federation.clients, config.to_flat()),
    )
    assert alive == [0, 0, 0, 0]
