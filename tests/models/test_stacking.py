"""Stacked adapters: the weight beside them gets the exact mean product, and clients get the weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layerfed.client.workbench import workbench
from layerfed.config import ConfigError, RunConfig
from layerfed.config.seeding import Stream, generator
from layerfed.models.adapters import merge_adapters
from layerfed.models.factors import adapted_weight, factor_pairs
from layerfed.models.layers import LayerMap, layer_costs
from layerfed.server.aggregation import Aggregation
from layerfed.strategies import STRATEGIES, checked
from layerfed.task.base import Batch, Examples
from tests.conftest import BLOCKS
from tests.fakes import Recorded
from tests.strategies.test_compositions import Wire
from tests.tiny_task import TinyTask, check_resumed, configured, run

TINY = "task.name=tests.tiny_task:TinyTask"
CONV = "task.name=tests.models.test_stacking:ConvTask"
SCALE = 16 / 2


def stacked(*settings: str) -> RunConfig:
    lora = ("model.tuning=lora", "model.lora-rank=2", "strategy.name=full")
    return configured(TINY, *lora, "server.aggregation=stack", *settings)


class ConvTask(TinyTask):
    """Blocks of convolutions, one of them without any width."""

    def build_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            blocks = [nn.Sequential(nn.Conv2d(4, 4, k, padding=k // 2), nn.Tanh()) for k in (3, 1)]
            ends = nn.Conv2d(1, 4, 1), nn.Sequential(nn.Flatten(), nn.Linear(4 * 25, 3))
            return nn.Sequential(ends[0], nn.Sequential(*blocks), ends[1])

    def partition(self, partition_id: int) -> Examples:
        rng = generator(0, Stream.PARTITION, partition_id)
        x = torch.tensor(rng.standard_normal((12, 1, 5, 5)), dtype=torch.float32)
        return Examples.of({"x": x, "label": torch.tensor(rng.integers(3, size=12))})

    def example(self) -> Batch:
        return {"x": torch.zeros(1, 1, 5, 5)}


def pairs_of(layers: LayerMap) -> list[tuple[str, str, str]]:
    found = [pair for block in layers.blocks for pair in factor_pairs(block.parameters)]
    return [(a, b, adapted_weight(a)) for a, b in found]


def distances(rule: str) -> list[float]:
    """Return how far each adapted weight is from W + α/r Σ_i p_i B_i·A_i after a rule's aggregation."""
    config = stacked(f"server.aggregation={rule}")
    resident = workbench(config.to_flat()).resident
    state, layers = resident.base_state(), resident.layers
    rng, examples = np.random.default_rng(0), (3, 9, 4)
    mean = Aggregation(rule, scale=SCALE).begin(layers, state, 1)
    exact = {w: state[w].astype(float) for _, _, w in pairs_of(layers)}
    for count in examples:
        update = {name: rng.standard_normal(value.shape) for name, value in state.items()}
        mean.add([block.name for block in layers.blocks], update, count)
        for a, b, w in pairs_of(layers):
            product = (state[b] + update[b]) @ (state[a] + update[a])
            exact[w] += SCALE * count / sum(examples) * product
    after = dict(state)
    for block in layers.blocks:
        after |= {n: state[n] + change for n, change in mean.pop(block.name).items()}
    return [
        float(np.linalg.norm(after[w] + SCALE * after[b] @ after[a] - exact[w]))
        for a, b, w in pairs_of(layers)
    ]


def test_each_rules_distance_from_the_mean_product() -> None:
    """FedIT's is the largest, FlexLoRA's what its rank leaves, FLoRA's none."""
    for average, svd, stack in zip(*map(distances, ("mean", "svd", "stack")), strict=True):
        assert average > svd > 0.1
        assert stack < 1e-12


@pytest.mark.parametrize("task", [TINY, CONV])
def test_the_sum_of_one_client_is_its_merged_model(task: str) -> None:
    """PEFT's own merge says what an adapter adds to a weight, also to a convolution's."""
    config = stacked(task, "federation.clients-per-round=1")
    grid = Recorded(config)
    done = run(config, 1, grid)
    [(_, reply)] = grid.trained()
    model = workbench(config.to_flat()).task.adapted(workbench(config.to_flat()).task.build_model())
    state = model.state_dict()
    with torch.no_grad():
        for name, change in reply.content.array_records["arrays"].items():
            state[name] += torch.from_numpy(change.numpy().copy())
    merge_adapters(model)
    merged = model.state_dict()
    layers = workbench(config.to_flat()).resident.layers
    for a, b, w in pairs_of(layers):
        name = w.replace(".base_layer", "")
        np.testing.assert_allclose(done.after[w], merged[name].numpy(), rtol=0, atol=1e-6)
        assert not np.array_equal(done.after[w], done.before[w])
        assert not done.after[b].any()
        assert not np.array_equal(done.after[a], done.before[a])
        assert np.abs(done.after[a]).max() <= 1 / np.sqrt(done.after[a].size / 2)


def test_clients_send_factors_and_get_weights() -> None:
    config = stacked("federation.clients-per-round=6")
    grid = Recorded(config)
    done = run(config, 2, grid)
    layers = workbench(config.to_flat()).resident.layers
    factors, weights = 4 * 2 * (6 + 6), 4 * 6 * 6
    for block in layers.blocks:
        assert (block.sent_bytes, block.bytes) == (factors, factors + weights)
    assert layer_costs(layers, "bytes").tolist() == [factors] * BLOCKS  # type: ignore[union-attr]
    assert layer_costs(layers, "parameters").tolist() == [24.0] * BLOCKS  # type: ignore[union-attr]
    first, second = (record.ledger.rows.values() for record in done.rounds)
    up = BLOCKS * factors + layers.head.bytes
    assert {row.up for row in (*first, *second)} == {up}
    assert {row.down for row in first} == {0}
    assert {row.down for row in second} == {up + BLOCKS * weights}
    for _, reply in grid.trained():
        assert not any("base_layer" in name for name in reply.content.array_records["arrays"])


def test_it_is_exact_in_a_round_of_several_and_the_same_over_the_wire() -> None:
    config = stacked("strategy.name=top", "budget.kind=half-normal", "budget.max=3")
    grid = Recorded(config)
    done, there = run(config, 2, grid), run(config, 2, Wire(config))
    assert all(np.array_equal(there.after[name], done.after[name]) for name in done.after)
    first = run(config, 1).after
    replies = [r for m, r in grid.trained() if m.metadata.group_id == "2"]
    moved = 0
    for a, b, w in pairs_of(workbench(config.to_flat()).resident.layers):
        total, weight = np.zeros(first[w].shape), 0.0
        for reply in replies:
            arrays = reply.content.array_records["arrays"]
            if a in arrays:
                count = float(reply.content.metric_records["metrics"]["examples"])
                own = (first[b] + arrays[b].numpy().astype(float)) @ (first[a] + arrays[a].numpy())
                total, weight = total + count * own, weight + count
        if not weight:
            np.testing.assert_array_equal(done.after[w], first[w])
            continue
        moved += 1
        exact = (first[w] + SCALE * total / weight).astype(np.float32)
        np.testing.assert_allclose(done.after[w], exact, rtol=1e-6, atol=1e-7)
    assert moved > 1


def test_a_resumed_run_is_the_same_to_the_bit() -> None:
    check_resumed(stacked())


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_stacks(name: str) -> None:
    unit = ("budget.unit=parameters", "budget.layers=48")
    config = stacked(f"strategy.name={name}", *unit, "exchange.codec=int8")
    if name == "fedluar":
        with pytest.raises(ConfigError, match="their last update cannot be used once more"):
            checked(config)
        return
    done = run(checked(config), 2)
    assert [record.failures for record in done.rounds] == [[], []]
    layers = workbench(config.to_flat()).resident.layers
    for record in done.rounds:
        assert "head" in record.moved
    for a, b, w in pairs_of(layers):
        assert not done.after[b].any()
        owner = layers.layer_of(a).name
        moved = any(owner in record.moved for record in done.rounds)
        assert np.array_equal(done.after[w], done.before[w]) is not moved, (name, owner)


def test_weights_never_get_a_gradient() -> None:
    bench = workbench(stacked().to_flat())
    run(stacked(), 1)
    for name, parameter in bench.resident.model.named_parameters():
        assert not parameter.requires_grad, name


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("server.optimizer=adam",), "'adam' does not go .* that change is no step"),
        (("server.lr=0.5",), "0.5 does not go .* that change is no step"),
        (("model.storage=int8",), "'int8' does not go .* are in float32 then"),
        (("exchange.downlink-codec=int8",), "those of the coded weights"),
        (("model.tuning=layers", "model.lora-rank=8"), "'stack' is for adapters"),
    ],
)
def test_what_does_not_stack_is_refused(settings: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        stacked(*settings)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("server.optimizer=adam", "'adam'"),
        ("server.optimizer=momentum", "'momentum'"),
        ("server.lr=0.5", "0.5"),
        ("server.average-over=cohort", "'cohort'"),
    ],
)
def test_a_change_of_svds_factors_is_not_scaled_as_a_step(setting: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{value} does not go .*'svd': .*change is no step"):
        stacked("server.aggregation=svd", setting)


def test_svd_takes_what_leaves_its_factors_alone() -> None:
    stacked("server.aggregation=svd", "model.storage=int8")
    with pytest.raises(ConfigError, match=r"'int8' does not go .*'svd': .* of the coded weights"):
        stacked("server.aggregation=svd", "exchange.downlink-codec=int8")


def test_fedluar_repeats_no_change_of_svds_factors() -> None:
    with pytest.raises(ConfigError, match=r"'svd' does not go .*'fedluar'.* used once more"):
        checked(stacked("server.aggregation=svd", "strategy.name=fedluar"))


class Transposed(TinyTask):
    """Blocks with GPT-2's own linear layer."""

    def build_model(self) -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        blocks = [nn.Sequential(Conv1D(8, 8), nn.Tanh()) for _ in range(2)]
        return nn.Sequential(nn.Linear(5, 8), nn.Sequential(*blocks), nn.Linear(8, 3))

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"])  # type: ignore[no-any-return]


def test_transposed_weights_are_refused() -> None:
    config = stacked("task.name=tests.models.test_stacking:Transposed")
    with pytest.raises(ConfigError, match="has them transposed"):
        workbench(config.to_flat())
