"""Statistics of several passes, against whole gradients, Jacobians and losses computed plainly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layerfed.client.passes import Passes
from layerfed.client.probe import probe_layers
from layerfed.client.statistics import POWER_STEPS, SEVERAL_PASSES
from layerfed.models.layers import LayerMap
from layerfed.models.stored import owners, put, stored
from layerfed.task.base import Batch
from tests.client.test_probe import _nothing_is_left
from tests.conftest import BLOCKS, TinyNet, cross_entropy

LR = 0.2


@pytest.fixture
def exact(tiny: nn.Module) -> nn.Module:
    """The model in float64, in evaluation mode."""
    copy = TinyNet().double()
    copy.load_state_dict(tiny.state_dict())
    return copy.eval()


def doubled(batch: Batch) -> Batch:
    return {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}


def gradients(model: nn.Module, batch: Batch) -> list[list[Tensor]]:
    """Gradients by block and parameter."""
    blocks = [list(block.parameters()) for block in model.blocks]
    loss = cross_entropy(model, batch)
    return [list(torch.autograd.grad(loss, block, retain_graph=True)) for block in blocks]


def flat(own: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in own])


def by_example(model: nn.Module, batch: Batch) -> Iterator[list[list[Tensor]]]:
    for i in range(len(batch["label"])):
        yield gradients(model, {name: t[i : i + 1] for name, t in batch.items()})


def probed(model: nn.Module, layers: LayerMap, batches: list[Batch], name: str) -> list[float]:
    return probe_layers(model, layers, batches, cross_entropy, [name], lr=LR)[0][name]


def test_fisher_is_the_norm_of_the_mean_of_squared_gradients_by_example(
    tiny: nn.Module, exact: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    each = list(by_example(exact, doubled(batches[0])))
    expected = [
        sum(
            float(torch.stack([example[b][p] ** 2 for example in each]).mean(dim=0).norm())
            for p in range(len(each[0][b]))
        )
        for b in range(BLOCKS)
    ]
    np.testing.assert_allclose(probed(tiny, layers, batches[:1], "fisher"), expected, rtol=1e-4)


def test_the_kernels_eigenvalue_is_that_of_the_whole_matrix(
    tiny: nn.Module, exact: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    each = list(by_example(exact, doubled(batches[0])))
    expected = []
    for b in range(BLOCKS):
        jacobian = torch.stack([flat(example[b]) for example in each])
        expected.append(float(torch.linalg.eigvalsh(jacobian @ jacobian.T)[-1]) / len(each))
    found = np.array(probed(tiny, layers, batches[:1], "ntk_eigenvalue"))
    assert (found <= np.array(expected) * (1 + 1e-5)).all(), "it is a lower bound"
    np.testing.assert_allclose(found, expected, rtol=0.01)
    assert np.argsort(found).tolist() == np.argsort(expected).tolist()


def test_the_signal_is_the_product_of_two_halves_gradients(
    tiny: nn.Module, exact: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    batch, count = doubled(batches[0]), len(batches[0]["label"])
    parts = [slice(count // 2), slice(count // 2, None)]
    one, other = (gradients(exact, {n: t[p] for n, t in batch.items()}) for p in parts)
    expected = [max(0.0, float(flat(a) @ flat(b))) for a, b in zip(one, other, strict=True)]
    found = probed(tiny, layers, batches[:1], "grad_signal_sq")
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-7)
    lonely = {name: tensor[:1] for name, tensor in batches[0].items()}
    np.testing.assert_allclose(
        probed(tiny, layers, [lonely], "grad_signal_sq"),
        probed(tiny, layers, [lonely], "grad_norm_sq"),
        rtol=1e-5,
    )


def test_the_decrease_is_that_of_a_step_on_one_layer(
    tiny: nn.Module, exact: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    batch = doubled(batches[0])
    before, own = cross_entropy(exact, batch), gradients(exact, batch)
    expected = []
    for block, gradient in zip(exact.blocks, own, strict=True):
        start = {name: t.clone() for name, t in block.state_dict().items()}
        with torch.no_grad():
            for parameter, g in zip(block.parameters(), gradient, strict=True):
                parameter -= LR * g
            expected.append(float(before - cross_entropy(exact, batch)))
        block.load_state_dict(start)
    found = probed(tiny, layers, batches[:1], "loss_decrease")
    np.testing.assert_allclose(found, np.maximum(expected, 0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("lr", [0.01, 1000.0])
def test_newtons_decrease_is_that_of_the_hessian(
    tiny: nn.Module, exact: nn.Module, layers: LayerMap, batches: list[Batch], lr: float
) -> None:
    batch = doubled(batches[0])
    parameters = [p for block in exact.blocks for p in block.parameters()]
    first = torch.autograd.grad(cross_entropy(exact, batch), parameters, create_graph=True)
    along = sum((g * g.detach()).sum() for g in first)
    products = torch.autograd.grad(along, parameters)
    expected, start = [], 0
    for block in exact.blocks:
        count = len(list(block.parameters()))
        g, hg = (
            flat(list(first[start : start + count])),
            flat(list(products[start : start + count])),
        )
        square, curvature = float((g @ g).detach()), float((g @ hg).detach())
        step = min(lr, square / curvature) if curvature > 0 else lr
        expected.append(max(0.0, step * square - step**2 * curvature / 2))
        start += count
    found, _ = probe_layers(tiny, layers, batches[:1], cross_entropy, ["newton_decrease"], lr=lr)
    np.testing.assert_allclose(found["newton_decrease"], expected, rtol=0.03, atol=1e-7)


@pytest.mark.parametrize("name", SEVERAL_PASSES)
def test_the_model_is_as_it_was_and_batches_are_averaged(
    name: str, tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    before = {key: tensor.clone() for key, tensor in tiny.state_dict().items()}
    tiny.train()
    found = probed(tiny, layers, batches, name)
    single = [probed(tiny, layers, [batch], name) for batch in batches]
    np.testing.assert_allclose(found, np.mean(single, axis=0))
    assert all(torch.equal(tensor, before[key]) for key, tensor in tiny.state_dict().items())
    _nothing_is_left(tiny, batches[0])


def test_what_a_statistic_costs_is_counted(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    """In passes over the batch: backward takes about twice a forward pass."""

    def flops(*names: str) -> float:
        return probe_layers(tiny, layers, batches[:1], cross_entropy, names)[1]

    one = flops("grad_norm_sq")
    assert flops("fisher") == pytest.approx(one)
    assert flops("ntk_eigenvalue") == pytest.approx(2 * POWER_STEPS * one)
    assert flops("grad_signal_sq") == pytest.approx(one)
    assert flops("newton_decrease") == pytest.approx(2 * one)
    assert one < flops("loss_decrease") < (1 + BLOCKS / 2) * one
    assert flops("grad_norm_sq", "fisher") == pytest.approx(2 * one)


def test_a_block_without_a_part_in_the_loss_counts_as_zero(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        x = model.embed(batch["x"])
        for block in model.blocks[1:]:
            x = block(x)
        return nn.functional.cross_entropy(model.head(model.norm(x)), batch["label"])

    found, _ = probe_layers(tiny, layers, batches[:1], loss, SEVERAL_PASSES)
    for name, values in found.items():
        assert values[0] == 0.0, name
        assert min(values[1:]) > 0.0 or name in ("loss_decrease", "grad_signal_sq")


def test_moved_weights_may_be_a_checkpoint_in_half_precision(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    """They are read-only then: every statistic is that of the same values in float32."""
    halves = {name: t.bfloat16() for name, t in tiny.state_dict().items() if t.is_floating_point()}
    tiny.load_state_dict(halves, strict=False)
    expected, _ = probe_layers(tiny, layers, batches[:1], cross_entropy, SEVERAL_PASSES, lr=LR)
    places = owners(tiny)
    for block in layers.blocks:
        for name in block.parameters:
            put(places[name], stored(halves[name]))
    held = {name: id(parameter) for name, parameter in tiny.named_parameters()}
    found, _ = probe_layers(tiny, layers, batches[:1], cross_entropy, SEVERAL_PASSES, lr=LR)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-7, err_msg=name)
    assert {name: id(parameter) for name, parameter in tiny.named_parameters()} == held


def test_moved_weights_come_back_also_when_a_pass_fails(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    passes = Passes(tiny, layers.blocks, batches[0], cross_entropy)
    before = {key: tensor.clone() for key, tensor in tiny.state_dict().items()}
    moved = passes.moved(1, passes.weights[1], 0.5)
    moved.__enter__()
    assert not torch.equal(tiny.blocks[1].linear.weight, before["blocks.1.linear.weight"])
    moved.__exit__(KeyError, KeyError(), None)
    assert all(torch.equal(tensor, before[key]) for key, tensor in tiny.state_dict().items())
