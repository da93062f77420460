"""Local training moves the selected blocks and the head exactly as SGD says, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from layerfed.client.training import Step, evaluate, selected_layers, train_layers
from layerfed.models.layers import LayerMap
from layerfed.task.base import Batch
from tests.conftest import BLOCKS, CLASSES, TinyNet, cross_entropy

LR = 0.3
MASK = [False, True, False, True]


def sgd(lr: float = LR) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return partial(torch.optim.SGD, lr=lr)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every parameter and buffer."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that are not bit-identical."""
    return {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}


def tensors_of(layers: LayerMap, names: Sequence[str]) -> set[str]:
    return {tensor for name in names for tensor in layers[name].tensors}


def test_local_sgd_equals_a_loop_written_out(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    """Defect 1 of the released code: gradients were cleared before the step, so nothing moved."""
    without_dropout(tiny)
    by_hand = TinyNet()
    without_dropout(by_hand).load_state_dict(tiny.state_dict())
    before = state(tiny)

    result = train_layers(tiny, layers, MASK, batches, cross_entropy, sgd())

    by_hand.eval()
    for block, on in zip(by_hand.blocks, MASK, strict=True):
        block.train(on)
    trained = {
        name: parameter
        for name, parameter in by_hand.named_parameters()
        if name.startswith(("blocks.1.", "blocks.3.", "norm.", "head."))
    }
    losses = []
    for batch in batches:
        loss = cross_entropy(by_hand, batch)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(trained.values()))
        with torch.no_grad():
            for parameter, gradient in zip(trained.values(), gradients, strict=True):
                parameter -= LR * gradient
    for name, expected in by_hand.state_dict().items():
        torch.testing.assert_close(tiny.state_dict()[name], expected, rtol=0, atol=1e-6, msg=name)
    assert changed(tiny, before) >= set(trained) - {"blocks.1.linear.bias", "blocks.3.linear.bias"}
    assert max((tiny.head.weight - before["head.weight"]).abs().flatten()) > 1e-2
    assert result.steps == 3
    assert result.loss == pytest.approx(np.mean(losses))
    assert result.flops > 0


@pytest.mark.parametrize("mask", [[0, 0, 0, 0], [1, 0, 0, 0], MASK, [1, 1, 1, 1]])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_only_masked_blocks_and_the_head_change(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch], mask: list[int], decay: float
) -> None:
    """Parameters and buffers alike: BatchNorm's statistics and batch count of frozen blocks too."""
    before = state(tiny)
    optimizer = partial(torch.optim.AdamW, lr=0.1, weight_decay=decay)

    train_layers(tiny, layers, [bool(m) for m in mask], batches, cross_entropy, optimizer)

    chosen = [b.name for b, on in zip(layers.blocks, mask, strict=True) if on] + ["head"]
    assert changed(tiny, before) == tensors_of(layers, chosen)
    for index, on in enumerate(mask):
        assert tiny.blocks[index].norm.num_batches_tracked == len(batches) * on


def test_with_frozen_statistics_a_step_goes_along_the_gradient_that_is_probed(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    without_dropout(tiny)
    batch, before = batches[0], state(tiny)
    tiny.eval().requires_grad_(True)
    own = dict(tiny.named_parameters())
    names = layers["blocks.1"].parameters
    gradients = torch.autograd.grad(cross_entropy(tiny, batch), [own[n] for n in names])
    frozen = layers.with_frozen_statistics(tiny)
    train_layers(tiny, frozen, [False, True, False, False], [batch], cross_entropy, sgd(LR))
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(own[name].detach(), before[name] - LR * gradient)
    assert not [n for n in changed(tiny, before) if "running_" in n or "tracked" in n]
    assert frozen["blocks.1"].parameters == names
    # Statistics of the batch are another function, along whose gradient this step does not go.
    tiny.load_state_dict(before)
    train_layers(tiny, layers, [False, True, False, False], [batch], cross_entropy, sgd(LR))
    weight = "blocks.1.norm.weight"
    step = before[weight] - LR * gradients[names.index(weight)]
    assert not torch.allclose(own[weight].detach(), step)


def test_frozen_blocks_neither_drop_out_nor_use_batch_statistics(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))
    tiny.train()
    with selected_layers(tiny, layers, ["blocks.1", "head"]), torch.no_grad():
        assert [block.training for block in tiny.blocks] == [False, True, False, False]
        assert [block.drop.training for block in tiny.blocks] == [False, True, False, False]
        assert tiny.head.training
        assert tiny.norm.training
        assert not tiny.embed.training
        for index in (0, 2, 3):
            first, second = tiny.blocks[index](x), tiny.blocks[index](x)
            assert torch.equal(first, second)
            # Row by row gives the same: the running statistics are used, not those of the batch.
            torch.testing.assert_close(tiny.blocks[index](x[:1]), first[:1])
        assert not torch.equal(tiny.blocks[1](x), tiny.blocks[1](x))


def test_inputs_below_the_lowest_selected_block_require_no_gradient(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    needs: list[bool] = []
    for block in tiny.blocks:
        block.register_forward_pre_hook(lambda _, args: needs.append(args[0].requires_grad))
    with selected_layers(tiny, layers, ["blocks.1", "blocks.3", "head"]):
        cross_entropy(tiny, batches[0])
    assert needs == [False, False, True, True]


def kept_for_backward(model: nn.Module, layers: LayerMap, batch: Batch, names: list[str]) -> int:
    """Return the bytes that autograd keeps during a forward pass, each storage once."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with selected_layers(model, layers, names), saved_tensors_hooks(pack, lambda t: t):
        loss = cross_entropy(model, batch)  # kept alive, so that no address is used twice
        assert loss.requires_grad
    return sum(held.values())


def test_the_higher_the_lowest_selected_block_the_less_is_kept_for_backward(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    without_dropout(tiny)
    names = [block.name for block in layers.blocks]
    choices = [*([name, "head"] for name in names), ["head"]]
    kept = [kept_for_backward(tiny, layers, batches[0], choice) for choice in choices]
    assert all(lower > higher for lower, higher in pairwise(kept)), kept


def test_nothing_is_kept_of_blocks_below_the_lowest_selected_one(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    without_dropout(tiny)
    below = {p.untyped_storage().data_ptr() for i in (0, 1) for p in tiny.blocks[i].parameters()}
    inputs: list[Tensor] = []
    for index in (0, 1):
        tiny.blocks[index].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with (
        selected_layers(tiny, layers, ["blocks.2", "head"]),
        saved_tensors_hooks(pack, lambda t: t),
    ):
        loss = cross_entropy(tiny, batches[0])
        below |= {tensor.untyped_storage().data_ptr() for tensor in inputs}
        assert saved, "the selected layers themselves are kept"
        assert not saved & below
    assert loss.requires_grad


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_no_parameter_requires_a_gradient_or_holds_one(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch], fails: bool
) -> None:
    """Defect 3 of the released code: gradients left behind leaked into the next client."""
    seen = []

    class Failing(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            seen.append(sum(p.grad is not None for p in tiny.parameters()))
            if fails and len(seen) == 2:
                raise RuntimeError("out of memory")
            super().step(closure)

    def step() -> None:
        train_layers(tiny, layers, MASK, batches, cross_entropy, partial(Failing, lr=LR))

    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            step()
    else:
        step()
    assert seen[0] == 2 * 4 + 4  # two blocks of linear and norm, final norm and head
    assert len(seen) == (2 if fails else 3)
    assert not any(p.requires_grad for p in tiny.parameters())
    assert all(p.grad is None for p in tiny.parameters())
    assert not any(module.training for module in tiny.modules())


def test_a_gradient_left_behind_has_no_part_in_the_next_training(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    """Defect 3 of the released code."""
    without_dropout(tiny)
    start = state(tiny)
    train_layers(tiny, layers, MASK, batches, cross_entropy, sgd())
    clean = state(tiny)

    tiny.load_state_dict(start)
    for parameter in tiny.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    train_layers(tiny, layers, MASK, batches, cross_entropy, sgd())
    assert changed(tiny, clean) == set()


def test_a_loss_that_is_not_finite_is_an_error(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    batches[1] = {**batches[1], "x": batches[1]["x"] * float("nan")}
    with pytest.raises(ValueError, match=r"the training loss is nan; lower train\.lr"):
        train_layers(tiny, layers, MASK, batches, cross_entropy, sgd())


def test_training_and_evaluating_on_nothing_is_an_error(tiny: nn.Module, layers: LayerMap) -> None:
    with pytest.raises(ValueError, match="no batch to train on"):
        train_layers(tiny, layers, MASK, [], cross_entropy, sgd())
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        evaluate(tiny, [], lambda model, batch: model(batch["x"]))


def test_a_mask_of_another_length_is_an_error(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    with pytest.raises(ValueError, match="zip"):
        train_layers(tiny, layers, [True] * (BLOCKS - 1), batches, cross_entropy, sgd())


def test_bfloat16_trains_close_to_float32_and_keeps_float32_weights(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    without_dropout(tiny)
    start = state(tiny)
    seen: set[torch.dtype] = set()
    tiny.head.register_forward_hook(lambda _, args, out: seen.add(out.dtype))
    results = {}
    for precision in ("float32", "bfloat16"):
        tiny.load_state_dict(start)
        train_layers(tiny, layers, MASK, batches, cross_entropy, sgd(), how=Step(precision))
        results[precision] = state(tiny)
    assert seen == {torch.float32, torch.bfloat16}
    assert {t.dtype for t in results["bfloat16"].values()} == {torch.float32, torch.int64}
    assert changed(tiny, start) <= tensors_of(layers, ["blocks.1", "blocks.3", "head"])
    weight = {k: v["head.weight"] for k, v in results.items()}
    assert not torch.equal(weight["float32"], weight["bfloat16"])
    torch.testing.assert_close(weight["bfloat16"], weight["float32"], rtol=0, atol=2e-2)


def test_evaluate_equals_numbers_worked_out_by_hand() -> None:
    scores = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
    labels = torch.tensor([0, 1, 2, 1])
    # A last batch of one example must count as one example, not as one batch.
    batches = [
        {"x": scores[:3], "label": labels[:3]},
        {"x": scores[3:], "label": labels[3:]},
    ]

    def logits(model: nn.Module, batch: Batch) -> Tensor:
        assert not torch.is_grad_enabled()
        return model(batch["x"])

    accuracy, loss = evaluate(nn.Identity(), batches, logits)
    e = np.exp
    by_hand = [
        -np.log(e(2) / (e(2) + 2)),
        -np.log(e(1) / (e(1) + 2)),
        np.log(3),
        -np.log(1 / (e(3) + 2)),
    ]
    assert accuracy == 0.5
    assert loss == pytest.approx(np.mean(by_hand), rel=1e-6)


def test_evaluation_changes_nothing_and_repeats_itself(
    tiny: nn.Module, batches: list[Batch]
) -> None:
    before = state(tiny)
    tiny.train()
    results = {evaluate(tiny, batches, lambda m, b: m(b["x"])) for _ in range(2)}
    assert len(results) == 1, "dropout was on"
    assert changed(tiny, before) == set()
    assert results.pop()[1] == pytest.approx(np.log(CLASSES), rel=0.5)
