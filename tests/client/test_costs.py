"""Measured costs: c_l and D_l give the cost of a step over any layers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from layerfed.client.costs import MEASURED_UNITS, _split, measure_costs, step_cost
from layerfed.client.training import selected_layers
from layerfed.models.layers import LayerMap
from layerfed.task.base import Batch
from tests.conftest import BLOCKS, cross_entropy


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
