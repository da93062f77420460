"""The probe against gradients computed plainly: one batch at a time, whole, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layerfed import client_app
from layerfed.client.probe import probe_layers
from layerfed.client.statistics import SEVERAL_PASSES, STATISTICS, load_statistic, statistic
from layerfed.client.training import train_layers
from layerfed.models.layers import LayerMap
from layerfed.task import load_task
from layerfed.task.base import Batch
from tests.client.test_memory import DEPTH, ROWS, WIDTH, Chain
from tests.client.test_memory import loss as chain_loss
from tests.conftest import BLOCKS, TinyNet, cross_entropy
from tests.tiny_task import configured, run


def gradients(model: nn.Module, batch: Batch) -> list[np.ndarray]:
    """Each block's whole gradient at θ^t, flattened, in float64."""
    exact = TinyNet().double()
    exact.load_state_dict(model.state_dict())
    exact.eval()
    loss = cross_entropy(exact, {"x": batch["x"].double(), "label": batch["label"]})
    return [
        np.concatenate(
            [
                g.flatten().numpy()
                for g in torch.autograd.grad(loss, list(block.parameters()), retain_graph=True)
            ]
        )
        for block in exact.blocks
    ]


def naive(model: nn.Module, batches: list[Batch]) -> dict[str, np.ndarray]:
    per_batch = [gradients(model, batch) for batch in batches]
    weights = [
        torch.cat([p.detach().flatten() for p in block.parameters()]).double().numpy()
        for block in model.blocks
    ]
    return {
        "grad_norm_sq": np.mean([[g @ g for g in row] for row in per_batch], axis=0),
        "grad_mean_sq": np.mean([[np.mean(g**2) for g in row] for row in per_batch], axis=0),
        "relative_grad_sq": np.mean(
            [[(g @ g) / (w @ w) for g, w in zip(row, weights, strict=True)] for row in per_batch],
            axis=0,
        ),
        "param_norm_sq": np.array([w @ w for w in weights]),
        "snr": np.mean([[abs(g.mean()) / g.var() for g in row] for row in per_batch], axis=0),
        "snr_code": np.mean([released(model, batch) for batch in batches], axis=0),
    }


def released(model: nn.Module, batch: Batch) -> list[float]:
    """The released code's ratio of each block: mean(g)² / std(g) of each tensor, summed [C]."""
    exact = TinyNet().double()
    exact.load_state_dict(model.state_dict())
    exact.eval()
    loss = cross_entropy(exact, {"x": batch["x"].double(), "label": batch["label"]})
    ratios = []
    for block in exact.blocks:
        tensors = torch.autograd.grad(loss, list(block.parameters()), retain_graph=True)
        ratios.append(sum(float(g.mean() ** 2 / g.std()) for g in tensors))
    return ratios


@pytest.mark.parametrize("count", [1, 3])
def test_statistics_equal_the_plain_computation(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch], count: int
) -> None:
    expected = naive(tiny, batches[:count])
    found, flops = probe_layers(tiny, layers, batches[:count], cross_entropy)
    assert list(found) == list(STATISTICS)
    for name in STATISTICS:
        assert len(found[name]) == BLOCKS
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, err_msg=name)
    assert flops > 0


def test_several_batches_give_the_mean_and_not_the_norm_of_running_sums(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    """Defect 2 of the released code: gradients added up from batch to batch."""
    found, _ = probe_layers(tiny, layers, batches, cross_entropy)
    single = [probe_layers(tiny, layers, [batch], cross_entropy)[0] for batch in batches]
    for name in STATISTICS:
        np.testing.assert_allclose(found[name], np.mean([s[name] for s in single], axis=0))

    repeated, _ = probe_layers(tiny, layers, [batches[0]] * 4, cross_entropy)
    assert repeated["grad_norm_sq"] == pytest.approx(single[0]["grad_norm_sq"])

    sums = np.cumsum([gradients(tiny, batch)[0] for batch in batches], axis=0)
    running = np.mean([g @ g for g in sums])
    assert found["grad_norm_sq"][0] != pytest.approx(running, rel=0.2)


def test_a_batch_that_does_not_reach_a_block_counts_as_a_gradient_of_zero(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    """For example an expert without examples; the last batch's gradient must not take its place."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if batch is batches[0]:
            return cross_entropy(model, batch)
        x = model.embed(batch["x"])
        for block in model.blocks[1:]:
            x = block(x)
        return nn.functional.cross_entropy(model.head(model.norm(x)), batch["label"])

    first, _ = probe_layers(tiny, layers, batches[:1], loss)
    both, _ = probe_layers(tiny, layers, batches[:2], loss)
    assert both["grad_norm_sq"][0] == pytest.approx(first["grad_norm_sq"][0] / 2)


@pytest.mark.parametrize("on", [(0, 1, 1, 0), (0, 0, 1, 1), (1, 0, 0, 0)])
def test_a_probe_of_some_blocks_gives_what_the_whole_one_gives_of_them(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch], on: Sequence[int]
) -> None:
    several = [name for name, found in SEVERAL_PASSES.items() if not found.together]
    names, rows = [*STATISTICS, *several], np.flatnonzero(on)
    whole, most = probe_layers(tiny, layers, batches[:1], cross_entropy, names)
    found, flops = probe_layers(
        tiny, layers, batches[:1], cross_entropy, names, blocks=[bool(x) for x in on]
    )
    assert flops < most
    for name in names:
        expected = np.array(whole[name])[rows]
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-9, err_msg=name)
    _nothing_is_left(tiny, batches[0])


@pytest.mark.parametrize("on", [(0, 0, 0, 1), (0, 1, 1, 0), (1, 0, 0, 0), (1, 1, 1, 1)])
def test_below_the_lowest_block_and_of_other_blocks_weights_nothing_is_computed(
    on: Sequence[int],
) -> None:
    model = Chain()
    layers = LayerMap.from_model(model)
    batch = {"x": torch.randn(ROWS, 8), "label": torch.randint(3, (ROWS,))}
    blocks, low = [bool(x) for x in on], on.index(1)
    _, flops = probe_layers(model, layers, [batch], chain_loss, blocks=blocks)
    first, block, head = 2 * ROWS * 8 * WIDTH, 2 * ROWS * WIDTH * WIDTH, 2 * ROWS * WIDTH * 3
    forward, down = first + DEPTH * block + head, (DEPTH - 1 - low) * block + head
    assert flops == forward + down + sum(on) * block


def test_the_order_of_batches_does_not_matter(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    """Defect 2 of the released code: the first batch counted most."""
    forward, _ = probe_layers(tiny, layers, batches, cross_entropy)
    backward, _ = probe_layers(tiny, layers, batches[::-1], cross_entropy)
    for name in STATISTICS:
        np.testing.assert_allclose(forward[name], backward[name], rtol=1e-12)


def test_only_the_statistics_asked_for_are_returned_in_that_order(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    everything, _ = probe_layers(tiny, layers, batches, cross_entropy)
    some, _ = probe_layers(tiny, layers, batches, cross_entropy, ["snr", "grad_norm_sq"])
    assert list(some) == ["snr", "grad_norm_sq"]
    assert some == {name: everything[name] for name in some}


def _nothing_is_left(model: nn.Module, batch: Batch) -> None:
    """Fail if a gradient is left, or a hook that would take the next one away."""
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    model.requires_grad_(True)
    cross_entropy(model, batch).backward()
    assert all(p.grad is not None for p in model.parameters()), "a hook was left behind"


def test_the_model_is_as_it_was(tiny: nn.Module, layers: LayerMap, batches: list[Batch]) -> None:
    """Weights and BatchNorm's statistics do not move, and no gradient or hook is left."""
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    tiny.train()
    probe_layers(tiny, layers, batches, cross_entropy)
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    _nothing_is_left(tiny, batches[0])


def test_no_hook_or_gradient_stays_behind_when_a_batch_fails(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    with pytest.raises(KeyError):
        probe_layers(tiny, layers, [batches[0], {"x": batches[1]["x"]}], cross_entropy)
    _nothing_is_left(tiny, batches[0])


def test_training_after_a_probe_equals_training_without_one(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    """Defect 3 of the released code: the first client trained on the probe's gradients too."""
    results = []
    start = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    for probed in (False, True):
        tiny.load_state_dict(start)
        if probed:
            probe_layers(tiny, layers, batches, cross_entropy)
        torch.manual_seed(5)  # dropout
        sgd = partial(torch.optim.SGD, lr=0.1)
        train_layers(tiny, layers, [True, False, True, False], batches, cross_entropy, sgd)
        results.append({name: tensor.clone() for name, tensor in tiny.state_dict().items()})
    without, after = results
    assert not torch.equal(without["head.weight"], start["head.weight"])
    for name in start:
        assert torch.equal(without[name], after[name]), name


def test_at_most_one_blocks_gradients_are_alive_at_a_time(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    """Hooks observe it; they run before the probe's own hooks free each gradient."""
    alive: list[int] = []

    def count(_: Tensor) -> None:
        alive.append(sum(p.grad is not None for p in tiny.parameters()))

    tiny.requires_grad_(True)  # as the hooks demand; the probe freezes what it does not measure
    for parameter in tiny.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    probe_layers(tiny, layers, batches, cross_entropy)
    in_blocks = sum(len(block.parameters) for block in layers.blocks)
    assert len(alive) == in_blocks * len(batches)
    assert max(alive) <= max(len(block.parameters) for block in layers.blocks)


class Constant(nn.Module):
    """Blocks whose gradient has no variance: one is zero, one the same everywhere, one varies."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 1)
        self.blocks = nn.ModuleList(nn.Linear(7, 1, bias=False) for _ in range(3))
        self.head = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        same = torch.full((1, 7), 0.1)
        different = torch.arange(1.0, 8.0).unsqueeze(0)
        total = 0.0 * self.blocks[0](same) + self.blocks[1](same) + self.blocks[2](different)
        return self.head(self.embed(x) + total)


def test_the_ratio_of_a_gradient_without_variance_is_zero() -> None:
    model = Constant()
    with torch.no_grad():
        model.head.weight.fill_(1.0)
    layers = LayerMap.from_model(model)
    batch = {"x": torch.ones(1, 1)}
    names = ["snr", "snr_code"]
    found, _ = probe_layers(model, layers, [batch], lambda m, b: m(b["x"]).sum(), names)
    # 1, 2, …, 7: mean 4, variance 28/7, and 28/6 as torch.std divides.
    assert found["snr"] == [0.0, 0.0, pytest.approx(4 / 4)]
    assert found["snr_code"] == [0.0, 0.0, pytest.approx(16 / (28 / 6) ** 0.5)]


def test_a_tensor_of_one_element_has_no_ratio() -> None:
    """Where torch.std gives NaN."""
    model = nn.ModuleDict()
    model["embed"] = nn.Linear(1, 1)
    model["blocks"] = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
    model["head"] = nn.Linear(1, 1)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        x = batch["x"]
        for layer in (model["embed"], *model["blocks"], model["head"]):  # type: ignore[index]
            x = layer(x)
        return x.sum()

    batch = {"x": torch.ones(1, 1)}
    found, _ = probe_layers(model, LayerMap.from_model(model), [batch], loss, ["snr_code"])
    assert found["snr_code"] == [0.0] * 3


def test_unknown_statistics_and_no_batch_are_errors(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    with pytest.raises(ValueError, match="unknown statistic 'curvature'; known: grad_norm_sq, "):
        probe_layers(tiny, layers, batches, cross_entropy, ["snr", "curvature"])
    with pytest.raises(ValueError, match="no batch to probe on"):
        probe_layers(tiny, layers, [], cross_entropy)


def test_bfloat16_probes_close_to_float32(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    exact, _ = probe_layers(tiny, layers, batches, cross_entropy)
    rough, _ = probe_layers(tiny, layers, batches, cross_entropy, precision="bfloat16")
    assert rough["grad_norm_sq"] != exact["grad_norm_sq"]
    np.testing.assert_allclose(rough["grad_norm_sq"], exact["grad_norm_sq"], rtol=0.1)
    assert rough["param_norm_sq"] == exact["param_norm_sq"]


@statistic()
def largest(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return max|g|, a statistic of a strategy's own."""
    return torch.stack([gradient.abs().max() for gradient in gradients]).max()


def not_one(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return gradients[0].sum()


def test_a_statistic_of_ones_own_is_named_by_module_and_function(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    name = f"{__name__}:largest"
    found, _ = probe_layers(tiny, layers, batches[:1], cross_entropy, [name])
    expected = [np.abs(row).max() for row in gradients(tiny, batches[0])]
    np.testing.assert_allclose(found[name], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["nothing", f"{__name__}:not_one", f"{__name__}:absent"])
def test_what_is_no_statistic_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown statistic|cannot be imported"):
        load_statistic(name)


@pytest.mark.usefixtures("tiny_task")
def test_a_probe_on_a_quarter_of_a_batch_takes_a_quarter_of_the_arithmetic() -> None:
    flops = {}
    for examples in (0, 8, 2):
        config = configured("strategy.name=rgn", f"strategy.probe-examples={examples}")
        flops[examples] = run(config).rounds[0].metrics["flops_probe"]
    # Another size of batch is counted anew, and the tiny task trains on batches of 8.
    assert flops[0] == flops[8]
    assert flops[2] == pytest.approx(float(flops[8] or 0) / 4)


def test_a_client_with_less_than_a_batch_measures_each_example_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also in parts: the parts of a batch are those of the examples that there are."""
    seen: list[int] = []

    def measured(
        model: nn.Module, layers: LayerMap, batches: Iterable[Batch], *rest: Any, **how: Any
    ):  # type: ignore[no-untyped-def]
        kept = list(batches)
        seen.append(sum(len(batch["x"]) for batch in kept))
        return probe_layers(model, layers, kept, *rest, **how)

    monkeypatch.setattr(client_app, "probe_layers", measured)
    config = configured(
        "task.name=tests.tiny_task:TinyTask", "train.batch-size=500", "train.micro-batch=7"
    )
    record = run(config).rounds[0]
    assert record.selection is not None
    sizes = [
        len(load_task(config).client_examples(client)[0]) for client in record.selection.clients
    ]
    assert sorted(seen) == sorted(sizes)
