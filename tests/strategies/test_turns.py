"""Layers that change: from round to round (cyclic), and within a round (random, resampled)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from layerfed.client.training import train_layers, train_update
from layerfed.client.workbench import workbench
from layerfed.config import ConfigError
from layerfed.models.layers import LayerMap
from layerfed.strategies import Cyclic, Random, RoundSettings
from layerfed.strategies.random import MOST_DRAWS
from tests.candidates import candidates
from tests.conftest import TinyNet
from tests.fakes import Recorded
from tests.tiny_task import configured, run

LAYERS = LayerMap.from_model(TinyNet())


def turns(budgets: list[float], rounds: int, **options: Any) -> list[list[list[int]]]:
    """Selected layers by round and client."""
    settings = RoundSettings(period=options.pop("period", 1))
    rule = Cyclic(LAYERS, settings=settings, **options)
    found = []
    for number in range(1, rounds + 1):
        masks = rule.select(candidates(budgets, [1.0] * 4, server_round=number)).masks
        found.append([np.flatnonzero(mask).tolist() for mask in masks])
    return found


# ---------------------------------------------------------------------------------------- cyclic
def test_layers_take_turns_from_the_input_to_the_output_and_again() -> None:
    assert turns([1], 6) == [[[0]], [[1]], [[2]], [[3]], [[0]], [[1]]]


def test_a_larger_budget_takes_the_layers_that_come_next() -> None:
    assert turns([1, 2, 3], 4) == [
        [[0], [0, 1], [0, 1, 2]],
        [[1], [1, 2], [1, 2, 3]],
        [[2], [2, 3], [0, 2, 3]],
        [[3], [0, 3], [0, 1, 3]],
    ]


def test_a_turn_lasts_a_period_and_begins_after_the_warm_up() -> None:
    everything = [[0, 1, 2, 3]]
    found = turns([1], 8, period=2, warmup_rounds=3)
    assert found == [everything] * 3 + [[[0]], [[0]], [[1]], [[1]], [[2]]]


def test_a_turns_layer_that_is_too_dear_is_passed_over() -> None:
    case = candidates([1], [1.0] * 4, depth=[3.0, 2.0, 0.0, 0.0])
    assert np.flatnonzero(Cyclic(LAYERS).select(case).masks[0]).tolist() == [2]


@pytest.mark.usefixtures("tiny_task")
def test_whole_runs_warm_up_and_then_take_turns() -> None:
    config = configured(
        "strategy.name=cyclic",
        "strategy.warmup-rounds=1",
        "strategy.period=2",
        "federation.clients-per-round=3",
    )
    result = run(config, 5)
    found = [{tuple(mask) for mask in result.masks(number).values()} for number in range(1, 6)]
    assert found == [{(0, 1, 2, 3)}, {(0,)}, {(0,)}, {(1,)}, {(1,)}]


@pytest.mark.usefixtures("tiny_task")
def test_the_warm_up_never_asks_a_node_for_more_than_it_states() -> None:
    config = configured("strategy.name=cyclic", "strategy.warmup-rounds=1")
    result = run(config, 1, Recorded(config, nodes=[{"budget": 3}] * 3))
    counts = {client: len(mask) for client, mask in result.masks(1).items()}
    assert counts == {client: 3 if client < 3 else 4 for client in counts}
    assert set(counts.values()) == {3, 4}
    assert not result.rounds[0].failures


# ----------------------------------------------------------------------------- random, resampled
def test_each_draw_keeps_to_the_budget_and_the_mask_is_their_union() -> None:
    settings = RoundSettings(local_steps=lambda examples: examples)
    rule = Random(LAYERS, resample_steps=2, settings=settings)
    case = candidates([1, 2], [1.0] * 12)
    case = type(case)(**{**vars(case), "examples": np.array([5, 12])})
    choice = rule.select(case)
    assert [len(choice.schedule(row)) for row in range(2)] == [3, 6], "⌈steps / 2⌉ draws"
    for row, budget in enumerate([1, 2]):
        assert (choice.schedule(row).sum(axis=1) == budget).all()
        np.testing.assert_array_equal(choice.schedule(row).any(axis=0), choice.masks[row])
    assert choice.masks[1].sum() > 2
    # The first draw is the one of a round that is not resampled.
    once = Random(LAYERS).select(case)
    for row in range(2):
        np.testing.assert_array_equal(once.masks[row], choice.schedule(row)[0])


def test_a_client_cannot_state_more_draws_than_a_server_makes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rule = Random(LAYERS, resample_steps=2, settings=RoundSettings(local_steps=lambda n: n))
    examples = np.array([2 * MOST_DRAWS, 2 * MOST_DRAWS + 1, 4])
    choice = rule.select(replace(candidates([1] * 3, [1.0] * 4), examples=examples))
    assert [len(choice.schedule(row)) for row in range(3)] == [MOST_DRAWS, 1, 2]
    (line,) = caplog.messages
    assert f"{2 * MOST_DRAWS + 1} examples are {MOST_DRAWS + 1} draws" in line


def test_resampling_must_know_how_many_steps_there_are() -> None:
    with pytest.raises(ConfigError, match=r"strategy.resample-steps = 2.*local_steps"):
        Random(LAYERS, resample_steps=2)


@pytest.mark.usefixtures("tiny_task")
def test_a_client_trains_one_draw_after_the_other_and_sends_all_it_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configured(
        "strategy.name=random",
        "strategy.resample-steps=2",
        "train.local-steps=5",
        "federation.clients-per-round=2",
    )
    trained: list[tuple[tuple[bool, ...], int]] = []

    def watched(*args: Any, **options: Any) -> Any:
        result = train_layers(*args, **options)
        trained.append((tuple(args[2]), result.steps))
        return result

    monkeypatch.setattr("layerfed.client.training.train_layers", watched)
    grid = Recorded(config)
    result = run(config, 1, grid)
    selection = result.rounds[0].selection
    assert selection is not None
    schedules = [selection.choice.schedule(row) for row in range(2)]
    assert [(list(mask), steps) for mask, steps in trained] == [
        (mask.tolist(), steps)
        for schedule in schedules
        for mask, steps in zip(schedule, (2, 2, 1), strict=True)
    ]
    layers = workbench(config.to_flat()).resident.layers
    for row, (_, reply) in enumerate(grid.trained()):
        due = layers.trained(selection.choice.masks[row])
        names = {t for layer in due for t in layers[layer].tensors}
        assert set(reply.content.array_records["arrays"]) == names
        assert reply.content.metric_records["metrics"]["steps"] == 5


@pytest.mark.usefixtures("tiny_task")
def test_epochs_give_each_client_its_own_number_of_draws() -> None:
    config = configured(
        "strategy.name=random",
        "strategy.resample-steps=1",
        "train.local-steps=0",
        "train.local-epochs=1",
        "federation.clients-per-round=6",
    )
    result = run(config)
    selection = result.rounds[0].selection
    assert selection is not None
    assert result.rounds[0].replies == 6
    draws = [len(selection.choice.schedule(row)) for row in range(6)]
    assert draws == [2, 2, 3, 3, 4, 4], "batches of 8 of 10, 14, …, 30 examples"


@pytest.mark.usefixtures("tiny_task")
def test_a_node_checks_every_draw_against_its_own_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws that each fit are trained, also if their union does not fit; a larger draw is refused."""
    config = configured("strategy.name=random", "strategy.resample-steps=1", "budget.kind=per-node")
    grid = Recorded(config, nodes=[{"budget": 1}] * 6)
    result = run(config, 1, grid)
    assert not result.rounds[0].failures
    assert max(len(mask) for mask in result.masks(1).values()) == 2

    question, _ = grid.trained()[0]
    started: list[object] = []
    monkeypatch.setattr(
        "layerfed.client_app.train_update",
        lambda *a, **k: started.append(a) or train_update(*a, **k),
    )
    config_record = question.content.config_records["config"]
    config_record["schedule"] = [1, 1, 0, 0, 0, 0, 0, 1]
    config_record["mask"] = [1, 1, 0, 1]
    (identity,) = grid.push_messages([question])
    (reply,) = grid.pull_messages([identity])
    assert "MaskRefused" in reply.error.reason
    assert not started


def test_rates_stay_as_they_are_by_default() -> None:
    settings = RoundSettings()
    assert [settings.lr_factor(7), settings.server_lr_factor(7)] == [1.0, 1.0]
