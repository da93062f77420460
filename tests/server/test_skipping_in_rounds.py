"""Whole rounds in which clients train shallower networks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from layerfed.client import workbench as workbench_module
from layerfed.client.workbench import workbench
from layerfed.config import ConfigError
from layerfed.server.skipping import Skipping
from layerfed.task.base import Batch
from tests.fakes import Recorded
from tests.strategies.test_compositions import WAYS
from tests.tiny_task import TinyTask, check_resumed, configured, run

SUBSTACK = ("train.skip=substack", "train.skip-rate=0.5")


class Traced(TinyTask):
    """The tiny task, whose model is split by its use on an example."""

    def example(self) -> Batch:
        return {"x": torch.linspace(-1, 1, 20).view(4, 5)}


@pytest.fixture(autouse=True, scope="module")
def traced_task() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workbench_module, "load_task", Traced)
        workbench_module._workbench.cache_clear()
        yield
    workbench_module._workbench.cache_clear()


@pytest.mark.parametrize(
    ("way", "rule"), [*((way, "substack") for way in WAYS), ("ilp", "random"), ("full", "random")]
)
def test_no_client_trains_or_sends_a_block_that_it_skips(way: str, rule: str) -> None:
    config = configured(*WAYS[way], f"train.skip={rule}", "budget.layers=2")
    grid = Recorded(config)
    found = run(config, rounds=2, grid=grid)
    layers = workbench(config.to_flat()).resident.layers
    runs = {}
    for record in found.rounds:
        assert record.failures == []
        assert record.e1 is None  # clients have no gradients of what they skip
        assert record.selection is not None
        masks, selected = record.selection.choice.masks, record.selection.runs
        assert selected is not None
        assert not (masks & ~selected).any()
        for client, own in zip(record.selection.clients, selected, strict=True):
            runs[record.round, client] = own
        if rule == "substack":
            assert (selected.sum(axis=1) == 2).all()
    for message, reply in grid.trained():
        told = message.content.config_records["config"]
        own = runs[told["round"], told["client"]]
        assert told["runs"] == own.astype(int).tolist()
        skipped = [block for block, on in zip(layers.blocks, own, strict=True) if not on]
        names = {name for block in skipped for name in block.tensors}
        assert names.isdisjoint(reply.content.array_records["arrays"])
    for message, reply in grid.replies:
        if message.metadata.message_type == "query.probe":
            told = message.content.config_records["config"]
            row = reply.content.metric_records["statistics"]
            for values in row.values():
                assert [v == 0 for v in values] == [not on for on in told["runs"]] or way == "rgn"


def test_a_rule_passes_over_skipped_blocks_and_spends_the_budget_on_others() -> None:
    for name, first in (("top", 3), ("bottom", 0)):
        found = run(configured(*SUBSTACK, f"strategy.name={name}", "budget.layers=1"), rounds=3)
        for record in found.rounds:
            selection = record.selection
            assert selection is not None
            for mask, own in zip(selection.choice.masks, selection.runs, strict=True):
                running = np.flatnonzero(own)
                assert np.flatnonzero(mask).tolist() == [running[-1 if first else 0]]


def test_draws_are_kept_between_selections_and_resumed() -> None:
    found = run(configured(*SUBSTACK, "strategy.name=full", "strategy.period=2"), rounds=4)
    drawn = [
        {c: tuple(row) for c, row in zip(r.selection.clients, r.selection.runs, strict=True)}
        for r in found.rounds
        if r.selection is not None
    ]
    for one, two in ((drawn[0], drawn[1]), (drawn[2], drawn[3])):
        common = one.keys() & two.keys()
        assert common
        assert all(one[client] == two[client] for client in common)
    assert any(drawn[1][c] != drawn[2][c] for c in drawn[1].keys() & drawn[2].keys())
    check_resumed(configured(*SUBSTACK, "strategy.name=ilp"))


def test_less_is_computed_than_with_the_whole_depth() -> None:
    whole = run(configured("strategy.name=head"))
    half = run(configured("strategy.name=head", *SUBSTACK))
    assert half.rounds[0].metrics["flops"] < whole.rounds[0].metrics["flops"]


def test_rates_are_those_of_the_rules() -> None:
    free, many = (True, True, False, True, True, True), range(4000)
    random = Skipping("random", 0.4, free)
    shares = 1 - np.mean([random.runs(0, 1, client) for client in many], axis=0)
    expected = 0.8 * np.arange(1, 7) / 7 * np.array(free)
    np.testing.assert_allclose(shares, expected, atol=0.03)
    stack = np.array([Skipping("substack", 0.5, free).runs(0, 1, client) for client in many])
    assert (stack.sum(axis=1) == 3).all()
    np.testing.assert_allclose(1 - stack.mean(axis=0), 0.6 * np.array(free), atol=0.03)
    two = (True, True)
    assert all(Skipping("random", 0.5, two).runs(0, 1, client).any() for client in many)
    assert Skipping("substack", 0.9, two).runs(0, 1, 0).sum() == 1
    assert Skipping("substack", 0.9, free).runs(0, 1, 0).sum() == 1, "one cannot be left out"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.skip=random", "train.skip-rate=0.6"], "above 0.5"),
        (["train.skip=substack", "train.prefix-cache=5"], "train.prefix-cache"),
        (["train.skip=substack", "secagg.enabled=true", "strategy.name=top"], "train.skip"),
        (["train.skip=random", "strategy.theory=true"], "train.skip = 'random'.*E1"),
        (["train.skip=half"], "'substack'"),
        (["train.skip-rate=1"], "train.skip-rate"),
    ],
)
def test_settings_that_cannot_be_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        configured(*overrides)


def test_a_model_without_residual_blocks_is_refused() -> None:
    config = configured(*SUBSTACK, "model.units=blocks.*.linear")
    with pytest.raises(ConfigError, match=r"train\.skip = 'substack' finds no block"):
        run(config)
