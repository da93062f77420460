"""`auto` chooses an engine by measurement, and clients of Ray share a machine by measured memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, RecordDict

from layerfed import engine
from layerfed.client.workbench import Workbench, workbench
from layerfed.client_app import client_app
from layerfed.config import ConfigError, NodeConfig, RunConfig
from layerfed.engine import _actors, _checked_actors, choose_engine
from layerfed.exchange import Manifest, instruction, store
from layerfed.grids.inprocess import InProcessGrid
from layerfed.grids.ray import Actors, Clients, RayGrid, _environment
from tests.tiny_task import configured

TINY = "task.name=tests.tiny_task:TinyTask"


def machine(monkeypatch: pytest.MonkeyPatch, *, cores: int = 4, free: float = 1e12) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(engine, "free_memory", lambda device: free)


# ------------------------------------------------------------------------------------- auto
def test_a_long_run_is_worth_ray_and_a_short_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    monkeypatch.setattr(Workbench, "first_step", (1e6, 0.5))
    # Four clients a round, two steps and a batch of the probe each: 6 s of work a round.
    assert choose_engine(configured(TINY, "federation.rounds=2"), "auto")[0] == "inprocess"
    chosen, why = choose_engine(configured(TINY, "federation.rounds=10"), "auto")
    assert (chosen, why) == ("ray", "4 clients at a time, for about 60 s of work")


@pytest.mark.parametrize(
    ("cores", "free", "setting"),
    [(1, 1e12, "run.seed=0"), (8, 1.9e9, "run.seed=0"), (8, 1e12, "run.client-cpus=8")],
)
def test_room_for_one_client_is_no_case_for_ray(
    cores: int, free: float, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, cores=cores, free=free)
    monkeypatch.setattr(Workbench, "first_step", (1e9, 100.0))
    chosen, why = choose_engine(configured(TINY, setting), "auto")
    assert (chosen, why) == ("inprocess", "there is room for one client at a time")


def test_the_first_step_is_measured_on_the_first_client() -> None:
    bench = workbench(configured(TINY).to_flat())
    needed, seconds = bench.first_step
    assert needed == bench.memory_needed(0) > 0
    assert 0 < seconds < 60


def test_without_ray_clients_work_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    config = configured(TINY, "federation.rounds=100000")
    assert choose_engine(config, "auto") == ("inprocess", "Ray is not installed")
    with pytest.raises(ConfigError, match="simulation"):
        _checked_actors(config, workbench(config.to_flat()), False)
    assert choose_engine(config, "ray") == ("ray", "as asked")


# ------------------------------------------------------------------------------------- GPUs
def on_cards(monkeypatch: pytest.MonkeyPatch, cards: int, free: float) -> Workbench:
    machine(monkeypatch, cores=64, free=free)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    return cast(Workbench, SimpleNamespace(device=torch.device("cuda", 0), first_step=(27e9, 1.0)))


def config_of(*settings: str) -> RunConfig:
    return configured("federation.clients=40", "federation.clients-per-round=40", *settings)


@pytest.mark.parametrize(
    ("settings", "gpus", "count"),
    [
        ([], 1 / 2, 4),  # two cards of 80 GB, two clients of 27 GB each
        (["run.client-gpus=0.25"], 0.25, 8),  # as its user says
        (["run.client-gpus=2"], 2.0, 1),
        (["run.device=cuda:1"], 1 / 2, 2),
        (["federation.clients-per-round=3"], 1 / 2, 3),
    ],
)
def test_clients_share_gpus_by_measured_memory(
    settings: list[str], gpus: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = on_cards(monkeypatch, cards=2, free=80e9)
    found = _actors(config_of(*settings), bench, 27e9)
    assert (found.gpus, found.count) == (gpus, count)


def test_a_client_that_fits_no_gpu_is_refused_with_both_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = on_cards(monkeypatch, cards=1, free=16e9)
    with pytest.raises(ConfigError, match=r"needs 27\.0 GB on cuda:0, and 16\.0 GB are free"):
        _checked_actors(config_of("federation.rounds=1"), bench, False)


@pytest.mark.parametrize(
    ("device", "visible", "seen"),
    [("cuda:1", None, "1"), ("cuda:1", "4,6", "6"), ("cuda", "4,6", "4,6"), ("auto", None, None)],
)
def test_ray_sees_only_the_gpu_that_the_run_names(
    device: str, visible: str | None, seen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with _environment(Actors(1, device=device)):
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == seen
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


# ------------------------------------------------------------------------------------- an actor
@pytest.fixture
def own_memory() -> Iterator[None]:
    """A memory store for this test alone, since an actor's shows another process's."""
    store._memory.cache_clear()
    yield
    store._memory.cache_clear()


def training(config: RunConfig, number: int) -> Message:
    node = NodeConfig.read({"partition-id": 0, "num-partitions": 6})
    resident = workbench(config.to_flat(), node).resident
    digests = {layer.name: resident._digest(layer.name) for layer in resident.layers.layers}
    asked = {"mask": [0, 0, 1, 0], "lr": 0.1, "codec": "int8", "run": "x"}
    manifest = Manifest(resident.base, digests)
    return instruction(
        *("train", 2),
        server_round=number,
        timeout=60,
        manifest=manifest,
        arrays=ArrayRecord(),
        config=asked,
    )


def test_what_a_client_remembers_goes_with_it_to_another_actor(own_memory: None) -> None:
    config = configured(TINY, "exchange.codec=int8")
    reference = InProcessGrid(client_app, 6, config.to_flat())
    expected = [reference._work(training(config, number)) for number in (1, 2)]
    store._memory.cache_clear()

    state: RecordDict = RecordDict()
    own: Any = {}
    replies = []
    for number in (1, 2):
        actor = Clients(6, config.to_flat(), ())
        (reply, state), own = actor.work(training(config, number), state, own, "theirs", {})
        replies.append(reply)
        store._memory.cache_clear()  # the next actor is another process
    assert own
    for reply, same in zip(replies, expected, strict=True):
        sent, due = (m.content.array_records["arrays"] for m in (reply, same))
        assert list(sent) == list(due)
        for name in sent:
            np.testing.assert_array_equal(sent[name].numpy(), due[name].numpy())


def test_what_a_client_remembered_before_actors_took_over_goes_with_it(own_memory: None) -> None:
    config = configured(TINY, "exchange.codec=int8")
    grid = RayGrid(Actors(1), 6, config.to_flat())
    grid._work(training(config, 1))
    assert grid._kept_here(2)
    assert grid._kept_here(2) == grid._store.own
    assert grid._kept_here(3) == {}
