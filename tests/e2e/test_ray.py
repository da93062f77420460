"""Clients in actors of Ray: the run of the in-process engine, also when actors die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray
from flwr.app import ConfigRecord, Message, RecordDict

from layerfed.config import ConfigError, RunConfig
from layerfed.grids.inprocess import InProcessGrid
from layerfed.grids.ray import Actors, RayGrid
from layerfed.runs import read_lines
from tests.e2e.test_flower import left_behind
from tests.tiny_task import configured, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROUNDS = 3
# Seconds for a round: a new actor imports torch, perhaps on a busy machine.
PATIENCE = 300


def describe(node: int) -> Message:
    content = RecordDict({"config": ConfigRecord({"round": 0})})
    return Message(content, node, "query.describe")


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which each file is the end of a process."""
    return tmp_path_factory.mktemp("deaths")


@pytest.fixture(scope="module")
def config(deaths: Path) -> RunConfig:
    return configured(
        *("task.name=tests.node_tasks:Deadly", f"task.data={deaths}"),
        *("budget.kind=half-normal", "strategy.name=ilp"),
    )


def test_each_of_several_gpus_has_an_actor_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray is told of two GPUs, which need not be there: what it shares out is their numbers."""
    monkeypatch.setattr(ray, "init", partial(ray.init, num_cpus=2, num_gpus=2))
    config = configured("federation.clients-per-round=6")
    with RayGrid(Actors(5, cpus=0.5, gpus=1.0), 6, config.to_flat()) as grid:
        deadline = time.monotonic() + PATIENCE
        while len(grid._idle) < 2:
            grid._welcome()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert not grid._starting
        seen = [
            actor.__ray_call__.remote(lambda _: os.environ["CUDA_VISIBLE_DEVICES"])
            for actor in grid._idle
        ]
        assert sorted(ray.get(seen)) == ["0", "1"]


def test_what_stays_on_clients_is_that_of_one_process() -> None:
    """Personal layers and second adapters go from actor to actor with their client.

    It stands before those that share a grid, since a process has one Ray at a time.
    """
    own = ("model.personal=head", "model.tuning=lora", "model.personal-rank=2")
    tiny = ("task.name=tests.tiny_task:TinyTask", "task.local-test=0.3", "strategy.name=top")
    config = configured(*own, *tiny, "budget.layers=2", "federation.clients-per-round=6")
    expected = run(config, ROUNDS)
    with RayGrid(Actors(2), config.federation.clients, config.to_flat()) as grid:
        deadline = time.monotonic() + PATIENCE
        while not grid.parallel:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        grid._work = None  # type: ignore[assignment, method-assign]  # no client works in this process
        found = run(config, ROUNDS, grid, PATIENCE)
    for record, other in zip(found.rounds, expected.rounds, strict=True):
        assert record.failures == other.failures == []
        for client, numbers in other.numbers.rows.items():
            assert record.numbers.rows[client]["client_loss"] == pytest.approx(
                numbers["client_loss"], rel=1e-5
            )
    for name, value in expected.after.items():
        np.testing.assert_allclose(found.after[name], value, rtol=0, atol=1e-6, err_msg=name)


def test_what_clients_remember_comes_back_when_no_actor_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "get", lambda reference: reference)
    grid = RayGrid(Actors(1), 1, {})
    kept = {"run/0/blocks.0": {"error": np.ones(2)}}
    grid._own[1] = kept
    assert list(grid.pull_messages([])) == []
    assert grid._store.own == kept
    assert not grid._own


@pytest.fixture(scope="module")
def grid(config: RunConfig) -> Iterator[RayGrid]:
    with RayGrid(Actors(2), config.federation.clients, config.to_flat()) as made:
        deadline = time.monotonic() + 300
        while not made.parallel:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield made


def test_masks_and_weights_are_those_of_one_process(config: RunConfig, grid: RayGrid) -> None:
    expected = run(config, ROUNDS, InProcessGrid(grid._app, 6, config.to_flat()))
    work = grid._work
    grid._work = None  # type: ignore[assignment, method-assign]  # no client works in this process
    found = run(config, ROUNDS, grid, PATIENCE)
    grid._work = work  # type: ignore[method-assign]
    for number in range(1, ROUNDS + 1):
        assert found.masks(number) == expected.masks(number)
    moved = 0.0
    for name, value in expected.after.items():
        np.testing.assert_allclose(found.after[name], value, rtol=0, atol=1e-6, err_msg=name)
        moved = max(moved, float(np.abs(value - expected.before[name]).max()))
    assert moved > 1e-3
    assert len(list(grid.send_and_receive([describe(n) for n in (2, 3, 4)], timeout=PATIENCE))) == 3
    # Layers were read from Ray's object store, in the versions of the last round.
    assert grid._layers


def test_a_message_whose_actor_died_is_asked_again(
    config: RunConfig, grid: RayGrid, deaths: Path
) -> None:
    (deaths / "1").touch()
    found = run(config, 1, grid, PATIENCE)
    assert not list(deaths.iterdir())
    assert found.rounds[0].failures == []
    expected = run(config, 1, InProcessGrid(grid._app, 6, config.to_flat()))
    for name, value in expected.after.items():
        np.testing.assert_allclose(found.after[name], value, rtol=0, atol=1e-6, err_msg=name)


def test_a_client_whose_actors_die_twice_is_left_out(
    config: RunConfig, grid: RayGrid, deaths: Path
) -> None:
    for number in range(3):  # both actors, and one of the two that took their places
        (deaths / str(number)).touch()
    found = run(config, 1, grid, PATIENCE)
    (failure,) = found.rounds[0].failures
    assert "the actor died 2 times" in failure.reason
    assert found.rounds[0].selection is not None


def test_a_cluster_that_is_not_there_is_refused(config: RunConfig) -> None:
    with (
        pytest.raises(ConfigError, match=r"run\.ray-address = 'nowhere"),
        RayGrid(Actors(2, address="nowhere.invalid:1"), 2, config.to_flat()),
    ):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process_and_says_how_to_go_on(
    number: signal.Signals, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "layerfed.cli",
        "run",
        "--engine",
        "ray",
        "--dir",
        str(tmp_path),
    ]
    process = subprocess.Popen(
        [*command, "run.name=x", "federation.rounds=500", "federation.clients=4"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    rows = tmp_path / "x/metrics.jsonl"
    deadline = time.monotonic() + PATIENCE
    while not rows.exists() or len(read_lines(rows)) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, said
    assert "layerfed run --resume" in said
    assert json.loads((tmp_path / "x/summary.json").read_text())["status"] == "interrupted"
    assert left_behind(process.pid) == []
