"""The clients that are asked, if nodes come, go, fail, stay silent or make false claims."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Error, Message

from layerfed.config import BudgetConfig, ConfigError
from layerfed.exchange import (
    WRONG_SETTINGS,
    Description,
    Manifest,
    describe_reply,
    instruction,
)
from layerfed.exchange.messages import state_held
from layerfed.runs.records import RoundFailed
from layerfed.server import population as module
from layerfed.server.budgets import Budgets
from layerfed.server.holdings import Holdings
from layerfed.server.population import Population, federation_size
from layerfed.server.transport import exchange
from tests.fakes import PlayedGrid

Answer = Callable[[Message], Message | None]


def says(partition: int, partitions: int | None = None) -> Answer:
    return lambda message: describe_reply(message, Description(partition, 10, None, partitions))


def errs(message: Message) -> Message:
    return Message(Error(0, "Message Unavailable"), reply_to=message)


def silent(message: Message) -> None:
    return None


class FakeGrid(PlayedGrid):
    """Nodes by id, each with its answer."""

    def __init__(self, nodes: dict[int, Answer]) -> None:
        super().__init__(nodes)
        self.says = nodes

    @property
    def nodes_asked(self) -> list[int]:
        return [message.metadata.dst_node_id for message in self.asked]

    def answer(self, message: Message) -> Message | None:
        return self.says[message.metadata.dst_node_id](message)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.05)


def test_each_node_is_asked_once_and_known_by_its_partition() -> None:
    grid = FakeGrid({70: says(1), 50: says(0), 60: says(2)})
    population = Population(3, at_least=3)
    population.wait(grid, 5)
    population.refresh(grid, 5)
    assert population.nodes == {0: 50, 1: 70, 2: 60}
    assert sorted(grid.nodes_asked) == [50, 60, 70]


def test_sampling_goes_by_partition_whatever_the_node_ids() -> None:
    samples = []
    for ids in ([5, 6, 7, 8], [80, 13, 44, 21]):
        population = Population(4, at_least=4)
        population.wait(FakeGrid({n: says(p) for p, n in enumerate(ids)}), 5)
        samples.append([population.sample(2, t, seed=3) for t in range(1, 6)])
    assert samples[0] == samples[1]
    assert len({tuple(s) for s in samples[0]}) > 1


def test_a_node_that_erred_is_asked_again_and_then_taken() -> None:
    grid = FakeGrid({5: says(0), 6: errs})
    population = Population(2, at_least=1)
    population.wait(grid, 5)
    assert population.nodes == {0: 5}
    grid.says[6] = says(1)
    assert population.refresh(grid, 5) == {0: 5, 1: 6}


def test_a_silent_node_is_asked_a_few_times_only() -> None:
    grid = FakeGrid({5: says(0), 6: silent})
    population = Population(2, at_least=1)
    population.wait(grid, 5)
    for _ in range(5):
        population.refresh(grid, 5)
    assert grid.nodes_asked.count(6) == module.ATTEMPTS
    assert population.nodes == {0: 5}


def test_nobody_who_can_describe_itself_ends_the_wait_with_the_reason() -> None:
    with pytest.raises(RoundFailed, match="Message Unavailable"):
        Population(2, at_least=2).wait(FakeGrid({5: errs, 6: errs}), 60)


def test_too_few_clients_end_the_wait_at_its_timeout() -> None:
    with pytest.raises(RoundFailed, match=r"1 clients after 0\.1 s, 2 are needed"):
        Population(2, at_least=2).wait(FakeGrid({5: says(0)}), 0.1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [(says(0, 2), "the federation has 2 SuperNodes"), (says(7), "holds partition 7")],
)
def test_another_federation_than_configured_is_refused_before_the_run(
    answer: Answer, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Population(3, at_least=1).wait(FakeGrid({5: answer}), 5)


def test_the_size_of_a_federation_is_what_most_nodes_say() -> None:
    grid = FakeGrid({5: says(0, 3), 6: says(1, 3), 7: says(2, 10**6), 8: says(3)})
    assert federation_size(grid, 5) == 3
    with pytest.raises(ConfigError, match=r"no node states it; set federation\.clients"):
        federation_size(FakeGrid({5: says(0)}), 5)


def test_no_single_node_decides_the_size_of_a_federation() -> None:
    """The first to connect may be mistaken, or lie: the others are waited for."""
    with pytest.raises(
        RoundFailed, match="1 nodes are connected, and 1 of them state num-partitions"
    ):
        federation_size(FakeGrid({5: says(0, 2**31)}), 0.01)
    with pytest.raises(RoundFailed, match="start the others"):
        federation_size(FakeGrid({5: says(0, 3), 6: says(1, 3)}), 0.01)


def test_wrong_settings_are_said_once_and_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = []
    monkeypatch.setattr(module, "log", lambda level, *rest: levels.append(level))

    def wrong(message: Message) -> Message:
        return Message(Error(WRONG_SETTINGS, "too many clients"), reply_to=message)

    grid = FakeGrid({5: wrong, 6: wrong, 7: wrong})
    with pytest.raises(RoundFailed, match=r"itself: too many clients$"):
        Population(None, at_least=1).wait(grid, 5)
    assert sorted(grid.nodes_asked) == [5, 6, 7]
    assert levels == [logging.WARNING, logging.DEBUG, logging.DEBUG]


@pytest.mark.parametrize("misfit", [says(1, 5), says(9)])
def test_one_node_that_does_not_fit_keeps_no_run_from_beginning(misfit: Answer) -> None:
    population = Population(3, at_least=2)
    population.wait(FakeGrid({3: misfit, 50: says(0), 60: says(2)}), 5)
    assert population.nodes == {0: 50, 2: 60}


def test_a_node_that_does_not_state_what_budgets_need_is_left_out_beside_others() -> None:
    def affords(message: Message) -> Message:
        return describe_reply(message, Description(1, 10, budget=2.0))

    check = Budgets(BudgetConfig(kind="per-node"), np.ones(4), 0).check_stated
    population = Population(2, at_least=1, check=check)
    population.wait(FakeGrid({5: says(0), 6: affords}), 5)
    assert population.nodes == {1: 6}
    with pytest.raises(ConfigError, match="partition 0 states no budget"):
        Population(2, at_least=1, check=check).wait(FakeGrid({5: says(0)}), 5)


def test_too_few_that_fit_are_said_to_be_so() -> None:
    grid = FakeGrid({5: says(0), 6: says(1, 7)})
    with pytest.raises(
        RoundFailed, match=r"left out: federation\.clients = 2, but .* 7 SuperNodes"
    ):
        Population(2, at_least=2).wait(grid, 0.1)


def oversize(message: Message) -> Message:
    reply = says(1)(message)
    assert reply is not None
    reply.content.metric_records["metrics"].update({f"k{i}": 1 for i in range(2000)})
    return reply


def of_another_kind(message: Message) -> Message:
    reply = says(1)(message)
    assert reply is not None
    reply.metadata.message_type = "train"
    return reply


@pytest.mark.parametrize("answer", [oversize, of_another_kind, says(2**32), says(10**400)])
def test_a_description_that_none_can_be_is_left_out(answer: Answer) -> None:
    population = Population(None, at_least=1)
    population.wait(FakeGrid({5: says(0), 6: answer}), 5)
    assert population.nodes == {0: 5}


def test_only_versions_that_exist_are_remembered_of_a_newcomer() -> None:
    def claims(message: Message) -> Message:
        reply = says(0)(message)
        assert reply is not None
        state_held(reply, ["a", *(f"nothing {i}" for i in range(500))], "store")
        return reply

    holdings = Holdings()
    population = Population(1, at_least=1, holdings=holdings)
    manifest = Manifest("base", {"head": "a", "blocks.0": "b"})
    population.refresh(FakeGrid({5: claims}), 5, manifest)
    assert holdings._held == {5: {"a"}}
    assert holdings.lacks(5, manifest, ("head", "blocks.0")) == ("blocks.0",)


@pytest.mark.parametrize("newcomer", [says(1, 5), says(9), says(0)])
def test_a_newcomer_that_does_not_fit_neither_ends_the_run_nor_takes_a_place(
    newcomer: Answer,
) -> None:
    grid = FakeGrid({50: says(0), 60: says(2)})
    population = Population(3, at_least=2)
    population.wait(grid, 5)
    grid.says[3] = newcomer
    for _ in range(2):
        assert population.refresh(grid, 5) == {0: 50, 2: 60}


def test_a_node_that_left_is_not_sampled() -> None:
    grid = FakeGrid({50: says(0), 60: says(1)})
    population = Population(2, at_least=2)
    population.wait(grid, 5)
    grid.nodes.remove(50)
    population.refresh(grid, 5)
    assert population.sample(2, 1, seed=0) == [1]


def test_replies_come_with_the_node_that_was_asked_and_none_for_the_silent() -> None:
    grid = FakeGrid({5: says(0), 6: silent, 7: errs})
    questions = [instruction("query.describe", n, server_round=0, timeout=1) for n in (5, 6, 7)]
    found = {r.metadata.src_node_id: r for r in exchange(grid, questions, 0.05)}
    assert set(found) == {5, 6, 7}
    assert found[6].error.reason == "no reply in time"
    assert not found[5].has_error()
    assert found[7].has_error()


# ------------------------------------------------------------------------- nodes that were restarted
MANIFEST = Manifest("base", {"head": "a"})


def test_a_node_that_was_away_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    grid = FakeGrid({50: says(0), 60: says(1)})
    population = Population(3, at_least=2)
    population.wait(grid, 5)
    grid.nodes.remove(50)
    population.refresh(grid, 5)
    grid.says[50] = says(2)
    grid.nodes.append(50)
    with caplog.at_level(logging.INFO, "flwr"):
        assert population.refresh(grid, 5) == {2: 50, 1: 60}
    assert "node 50 states another partition: 2, before 0" in caplog.text


@pytest.mark.parametrize("before", [says(7), says(2**32), errs])
def test_a_node_that_was_left_out_and_away_is_asked_again(before: Answer) -> None:
    grid = FakeGrid({50: says(0), 60: before})
    population = Population(2, at_least=1)
    population.wait(grid, 5)
    for _ in range(3):
        population.refresh(grid, 5)
    grid.nodes.remove(60)
    population.refresh(grid, 5)
    grid.says[60] = says(1)
    grid.nodes.append(60)
    assert population.refresh(grid, 5) == {0: 50, 1: 60}


def test_settings_that_were_mended_between_two_rounds_are_seen() -> None:
    """A restart of seconds, which no refresh notices."""
    grid = FakeGrid({50: says(0), 60: says(7)})
    population = Population(2, at_least=1)
    population.wait(grid, 5)
    assert population.refresh(grid, 5, MANIFEST) == {0: 50}
    grid.says[60] = says(1)
    assert population.refresh(grid, 5, MANIFEST) == {0: 50, 1: 60}


def test_a_node_whose_reply_was_refused_is_asked_again_once() -> None:
    grid = FakeGrid({50: says(0), 60: says(1)})
    population = Population(2, at_least=2)
    population.wait(grid, 5)
    population.ask_again(60)
    grid.says[60] = silent
    assert population.refresh(grid, 5) == {0: 50}
    grid.says[60] = says(1)
    for _ in range(2):
        assert population.refresh(grid, 5) == {0: 50, 1: 60}
    assert grid.nodes_asked.count(60) == 3
