"""Measured costs: c_l and D_l give the cost of a step over any layers."""

from __future__ import annotations

import itertools
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from layerfed.client.costs import MEASURED_UNITS, _split, measure_costs, step_cost
from layerfed.client.training import Step, selected_layers
from layerfed.client.workbench import Workbench
from layerfed.config import RunConfig
from layerfed.models.layers import LayerMap
from layerfed.task.base import Batch, Examples
from tests.conftest import BLOCKS, cross_entropy
from tests.tiny_task import TinyTask, configured, run


def step_flops(
    model: nn.Module, layers: LayerMap, batch: Batch, selected: tuple[int, ...]
) -> float:
    names = [layers.blocks[i].name for i in selected]
    with selected_layers(model, layers, [*names, "head"]):
        model.eval()
        with FlopCounterMode(display=False) as counter:
            cross_entropy(model, batch).backward()
    return float(counter.get_total_flops())


def test_flops_of_every_mask_are_its_layers_and_the_way_down(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    own, depth = measure_costs(tiny, layers, batches[0], cross_entropy, "flops")
    head_only = step_flops(tiny, layers, batches[0], ())
    for size in range(1, BLOCKS + 1):
        for mask in itertools.combinations(range(BLOCKS), size):
            expected = own[list(mask)].sum() + depth[min(mask)]
            assert step_flops(tiny, layers, batches[0], mask) - head_only == expected
    assert (np.diff(depth) < 0).all()


@pytest.mark.parametrize("unit", MEASURED_UNITS)
def test_costs_are_sane_and_the_model_is_as_before(
    unit: str, tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    own, depth = measure_costs(tiny, layers, batches[0], cross_entropy, unit)  # type: ignore[arg-type]
    assert own.shape == depth.shape == (BLOCKS,)
    assert (own >= 0).all()
    assert (depth >= 0).all()
    assert (np.diff(depth) <= 0).all()
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None for p in tiny.parameters())


def test_memory_counts_activations_on_the_way_down_and_gradients(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    own, depth = measure_costs(tiny, layers, batches[0], cross_entropy, "memory")
    gradients = sum(p.nbytes for p in tiny.blocks[0].parameters())
    assert own[1] >= gradients
    activation = batches[0]["x"].shape[0] * 6 * 4
    assert (depth[:-1] - depth[1:] >= activation).all()


def test_noise_never_gives_negative_or_rising_costs() -> None:
    own, depth = _split(np.array([3.0, 5.0, 1.0, 2.0]), np.array([2.0, 9.0, 4.0]))
    assert (own >= 0).all()
    assert (depth >= 0).all()
    assert (np.diff(depth) <= 0).all()


def test_a_layer_is_never_free() -> None:
    """A cost of zero would pass every limit of a node's owner."""
    for alone, with_first in (([3.0, 1.0, 2.0], [2.0, 2.5]), ([-1.0, 5.0, 0.0], [-3.0, 2.0])):
        own, _ = _split(np.array(alone), np.array(with_first))
        assert (own > 0).all()


@pytest.mark.parametrize("unit", MEASURED_UNITS)
def test_micro_batches_are_measured_as_they_are_trained(
    unit: str, tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    batch = {name: torch.cat([tensor] * 4) for name, tensor in batches[0].items()}
    rows = len(batch["x"])
    seen: list[int] = []

    def loss(model: nn.Module, part: Batch) -> Tensor:
        seen.append(len(part["x"]))
        return cross_entropy(model, part)

    names = [block.name for block in layers.blocks]
    whole = step_cost(tiny, layers, names, batch, loss, unit)  # type: ignore[arg-type]
    seen.clear()
    how = Step(micro_batch=rows // 4)
    parts = step_cost(tiny, layers, names, batch, loss, unit, how=how)  # type: ignore[arg-type]
    assert set(seen) == {rows // 4}
    if unit == "flops":
        assert parts == whole
    if unit == "memory":
        gradients = sum(p.nbytes for b in tiny.blocks for p in b.parameters())
        head = sum(p.nbytes for p in (*tiny.norm.parameters(), *tiny.head.parameters()))
        assert parts - gradients - head < 0.3 * (whole - gradients - head)


def test_checkpointing_is_measured_too() -> None:
    model = nn.Sequential()
    model.embed = nn.Linear(4, 64)
    model.blocks = nn.ModuleList(
        nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(6)))
        for _ in range(4)
    )
    model.head = nn.Linear(64, 3)

    def loss(net: nn.Module, part: Batch) -> Tensor:
        x = net.embed(part["x"])
        for block in net.blocks:
            x = block(x)
        return nn.functional.cross_entropy(net.head(x), part["label"])

    layers = LayerMap.from_model(model, blocks="blocks.*")
    names = [block.name for block in layers.blocks]
    batch = {"x": torch.rand(512, 4), "label": torch.arange(512) % 3}
    whole = step_cost(model, layers, names, batch, loss, "memory")
    again = step_cost(model, layers, names, batch, loss, "memory", how=Step(checkpointing=True))
    assert again < 0.7 * whole
    flops = [
        step_cost(model, layers, names, batch, loss, "flops", how=Step(checkpointing=on))
        for on in (False, True)
    ]
    assert flops[1] > 1.2 * flops[0]


class Lengths(TinyTask):
    """A task whose second client has longer examples."""

    seen: ClassVar[list[int]] = []

    def partition(self, partition_id: int) -> Examples:
        rng = torch.Generator().manual_seed(partition_id)
        x = torch.randn(20, 2 + 6 * (partition_id == 1), 5, generator=rng)
        return Examples.of({"x": x, "label": torch.arange(20) % 3})

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        self.seen.append(len(batch["x"]))
        found: Tensor = model(batch["x"].flatten(0, 1))
        return found.unflatten(0, batch["x"].shape[:2]).mean(1)


def lengths(*overrides: str) -> RunConfig:
    return configured("task.name=tests.client.test_costs:Lengths", *overrides)


def test_no_client_has_the_costs_of_another_whose_examples_are_shorter() -> None:
    alone = Workbench(lengths()).costs(1, "flops")
    bench = Workbench(lengths())
    first = bench.costs(0, "flops")
    assert np.array_equal(bench.costs(1, "flops"), alone)
    assert (alone[0] > 3 * first[0]).all()


def test_a_probe_takes_no_more_examples_at_once_than_training() -> None:
    config = lengths("train.micro-batch=3", "strategy.name=ilp")
    Lengths.seen.clear()
    whole = run(config).rounds[0].numbers.rows
    assert max(Lengths.seen) == 3
    # Three parts of a probe, and two steps of eight.
    assert sum(Lengths.seen) == len(whole) * (3 * 3 + 2 * 8)


def test_a_single_layer_has_no_depth() -> None:
    own, depth = _split(np.array([7.0]), np.array([]))
    assert (own.tolist(), depth.tolist()) == ([7.0], [0.0])


def real_step(model: nn.Module, layers: LayerMap, batch: Batch, selected: tuple[int, ...]) -> float:
    """Bytes that a step of training keeps: gradients, and what backward needs, but for weights."""
    names = [layers.blocks[i].name for i in selected]
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with selected_layers(model, layers, [*names, "head"]):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            cross_entropy(model, batch).backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    storages = (t.untyped_storage() for t in kept.values())
    return gradients + sum(s.nbytes() for s in storages if s.data_ptr() not in weights)


def test_a_real_step_takes_no_more_memory_than_was_promised(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    """Dropout keeps a mask in training, which evaluation does without."""
    own, depth = measure_costs(tiny, layers, batches[0], cross_entropy, "memory")
    head = step_cost(tiny, layers, [], batches[0], cross_entropy, "memory")
    for size in range(1, BLOCKS + 1):
        for mask in itertools.combinations(range(BLOCKS), size):
            promised = head + own[list(mask)].sum() + depth[min(mask)]
            assert promised == pytest.approx(real_step(tiny, layers, batches[0], mask), rel=0.02)


@pytest.mark.parametrize("unit", MEASURED_UNITS)
def test_measuring_leaves_statistics_modes_and_generators_alone(
    unit: str, tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    generator = torch.get_rng_state()
    step_cost(tiny, layers, ["blocks.0", "blocks.2"], batches[0], cross_entropy, unit)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), generator)
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(module.training for module in tiny.modules())
