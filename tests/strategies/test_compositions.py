"""Every strategy with every kind of budget and every codec, in whole rounds."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from layerfed.client.workbench import workbench
from layerfed.config import Scalar
from layerfed.exchange import CODECS
from layerfed.strategies import STRATEGIES
from tests.fakes import Recorded
from tests.tiny_task import configured, run

pytestmark = pytest.mark.usefixtures("tiny_task")

# Names and settings: each strategy, and its ways of working.
WAYS = {
    **{name: [f"strategy.name={name}"] for name in STRATEGIES},
    "ilp, diverse": ["strategy.name=ilp", "strategy.consistency=-1"],
    "ilp, λ found": ["strategy.name=ilp", "strategy.consistency=auto"],
    "ilp, affordable": ["strategy.name=ilp", "strategy.penalty=affordable"],
    "ilp, switching": ["strategy.name=ilp", "strategy.switching=0.5"],
    "fed-hello, bottleneck": ["strategy.name=fed-hello", "strategy.allocation=bottleneck"],
    "ilp, every other round": ["strategy.name=ilp", "strategy.period=2"],
    "snr, code": ["strategy.name=snr", "strategy.form=code"],
    "random, resampled": ["strategy.name=random", "strategy.resample-steps=1"],
    "cyclic, warmed up": ["strategy.name=cyclic", "strategy.warmup-rounds=1"],
    "fedtlu, clients": ["strategy.name=fedtlu", "strategy.side=client"],
    "fedtlu, clients, l1": ["strategy.name=fedtlu", "strategy.side=client", "strategy.norm=l1"],
}
BUDGETS = {
    "identical": ["budget.layers=2"],
    "half-normal": ["budget.kind=half-normal", "budget.max=3"],
    "per-node": ["budget.kind=per-node"],
}
UNITS = {
    "parameters": ["budget.unit=parameters", "budget.layers=120"],
    "flops": ["budget.unit=flops", "budget.layers=2400"],
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("way", WAYS)
def test_every_strategy_works_with_every_budget_and_codec(
    way: str, budget: str, codec: str
) -> None:
    check(way, budget, codec, BUDGETS[budget])


@pytest.mark.parametrize("unit", ["layers", "bytes", "parameters", "flops", "memory"])
@pytest.mark.parametrize("way", ["full", "head", "fedtlu", "fedtlu, clients", "fedluar", "fedbcgd"])
def test_what_keeps_to_no_budget_runs_whatever_it_is(way: str, unit: str) -> None:
    """The one that a comparison leaves in place may be out of any range."""
    for amount in (0, 1e-6, 1e12):
        settings = [f"budget.unit={unit}", f"budget.layers={amount}"]
        result = run(configured(*WAYS[way], *settings))
        assert result.rounds[0].replies == 4


class Wire(Recorded):
    """A grid that writes and reads every message, as between processes and machines."""

    def _work(self, message: Message) -> Message:
        return _over_the_wire(super()._work(_over_the_wire(message)))


def _over_the_wire(message: Message) -> Message:
    written = message_to_proto(message).SerializeToString()
    return message_from_proto(ProtoMessage.FromString(written))


@pytest.mark.parametrize("codec", ["float32", "int8"])
@pytest.mark.parametrize("way", WAYS)
def test_every_strategy_is_the_same_over_the_wire(way: str, codec: str) -> None:
    """Ray, and a real SuperLink, hand over bytes where the in-process engine hands over objects."""
    settings = [*WAYS[way], "budget.layers=2", f"exchange.codec={codec}"]
    config = configured(*settings, "federation.clients-per-round=3", "strategy.theory=true")
    here, there = run(config, 2), run(config, 2, Wire(config))
    assert [record.failures for record in there.rounds] == [[], []]
    for number in (1, 2):
        assert there.masks(number) == here.masks(number)
    assert all(np.array_equal(there.after[name], here.after[name]) for name in here.after)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("way", WAYS)
def test_every_strategy_works_with_every_unit(way: str, unit: str) -> None:
    check(way, unit, "float32", UNITS[unit])


def check(way: str, budget: str, codec: str, settings: list[str]) -> None:
    """In two rounds nothing fails, only trained layers move, and budgets hold."""
    few = ["federation.clients-per-round=3", f"exchange.codec={codec}"]
    config = configured(*few, *WAYS[way], *settings)
    # `full` ignores budgets, and what a node itself states is never exceeded.
    room = 4 if way == "full" else 1
    nodes: list[dict[str, Scalar]] = [{"budget": max(room, 1 + i % 3)} for i in range(6)]
    result = run(config, 2, Recorded(config, nodes=nodes if budget == "per-node" else ()))
    layers = workbench(config.to_flat()).resident.layers

    assert [record.failures for record in result.rounds] == [[], []]
    moved = {layer for record in result.rounds for layer in record.moved}
    for layer in layers.layers:
        same = all(np.array_equal(result.before[t], result.after[t]) for t in layer.tensors)
        assert same == (layer.name not in moved), layer.name
    assert "head" in moved
    # Layers without adapters have one rank, which most of these budgets do not afford.
    assert (len(moved) > 1) == (way != "head") or way == "ranks"
    for record in result.rounds:
        selection = record.selection
        assert selection is not None
        limits = selection.budgets
        if not STRATEGIES[config.strategy.name].within_budget or (
            record.round <= config.strategy.keys.get("warmup-rounds", 0)
        ):
            # Whatever the run's budget, a node's own holds.
            limits = limits if budget == "per-node" else np.full(len(limits), np.inf)
        if way == "ranks":
            continue  # a mask does not tell what a client trains of a block
        for row, limit in enumerate(limits):
            for mask in selection.choice.schedule(row):
                spent = selection.costs[row][mask].sum()
                if mask.any():
                    spent += selection.depth_costs[row][mask.argmax()]
                assert spent <= limit * (1 + 1e-9)


def test_settings_of_other_strategies_are_no_errors() -> None:
    """One configuration serves a whole comparison."""
    everything = ["strategy.fraction=0.3", "strategy.warmup-rounds=2", "strategy.form=code"]
    for name in STRATEGIES:
        result = run(configured(f"strategy.name={name}", "budget.layers=2", *everything))
        assert result.rounds[0].replies == 4


def test_what_clients_state_of_their_costs_is_kept_apart_for_probe_and_training() -> None:
    (probing,) = run(configured("strategy.name=ilp")).rounds
    (plain,) = run(configured("strategy.name=top")).rounds
    for record in (probing, plain):
        assert record.metrics["steps"] == 4 * 2
        assert record.metrics["train_seconds"] > 0
        assert record.metrics["peak_memory"] > 0
    peaks = [record.metrics["peak_memory_probe"] for record in (probing, plain)]
    assert peaks[0] > 0 == peaks[1]
