"""The memory and arithmetic of a step: what is held at once, and what is never computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from layerfed.client import devices, memory, training
from layerfed.client.devices import chosen_precision
from layerfed.client.local_optimizers import Clipped, LocalAdamW, LocalSGD
from layerfed.client.memory import LiveBytes, Phases, rows_that_fit
from layerfed.client.prediction import masks_named, predicted_step
from layerfed.client.training import OptimizerFn, Step, Stepper, selected_layers, train_layers
from layerfed.client.workbench import workbench
from layerfed.config import ConfigError
from layerfed.models.layers import LayerMap
from layerfed.task.base import Batch
from tests.tiny_task import configured, run

WIDTH, ROWS, DEPTH = 64, 16, 4
MB = 4 * WIDTH * WIDTH  # one block's weights, in bytes


class Chain(nn.Module):
    """Blocks of one product each, so that FLOPs and bytes have a closed form."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH, bias=False)
        self.blocks = nn.ModuleList(Product(dropout) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Product(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(x))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["label"])


@pytest.fixture
def chain() -> nn.Module:
    torch.manual_seed(0)
    return Chain()


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(1)
    return {"x": torch.randn(ROWS, 8), "label": torch.randint(3, (ROWS,))}


def trained(
    model: nn.Module, batch: Batch, how: Step, mask: Sequence[bool] = (False, True, False, True)
) -> dict[str, Tensor]:
    layers = LayerMap.from_model(model)
    train_layers(model, layers, mask, [batch] * 3, loss, partial(LocalSGD, lr=0.1), how=how)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "how", [Step(micro_batch=5), Step(checkpointing=True), Step("float32", 3, True)]
)
def test_parts_and_recomputation_give_the_same_model(
    chain: nn.Module, batch: Batch, how: Step
) -> None:
    other = Chain()
    other.load_state_dict(chain.state_dict())
    before = {name: tensor.clone() for name, tensor in chain.state_dict().items()}
    found = trained(chain, batch, how)
    assert not torch.equal(found["blocks.1.linear.weight"], before["blocks.1.linear.weight"])
    alike(found, trained(other, batch, Step()))


def test_ignored_labels_and_weights_of_classes_count_in_parts(
    chain: nn.Module, batch: Batch
) -> None:
    """A mean of parts' means would count the only label of a part like all of another."""
    labels = batch["label"].clone()
    labels[:7] = -100
    ignored = {**batch, "label": labels}
    weights = torch.tensor([0.1, 1.0, 5.0])

    def weighted(model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["label"], weight=weights)

    weighted.terms = lambda batch: float(weights[batch["label"]].sum())  # type: ignore[attr-defined]
    for objective, data in ((loss, ignored), (weighted, batch)):
        gradients = []
        for how in (Step(), Step(micro_batch=8), Step(micro_batch=5)):
            kept: list[Tensor] = []
            with selected_layers(chain, LayerMap.from_model(chain), ["head"]):
                stepper = Stepper(chain, [chain.head.weight], objective, partial(Kept, kept), how)
                stepper(data)
            gradients.append(kept[0])
        for other in gradients[1:]:
            torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-7)


class Kept:
    """An optimiser that keeps the first gradient and moves nothing."""

    def __init__(self, kept: list[Tensor], parameters: list[nn.Parameter]) -> None:
        self.kept, self.parameters = kept, parameters

    def step(self) -> None:
        assert self.parameters[0].grad is not None
        self.kept.append(self.parameters[0].grad.clone())

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.parameters[0].grad = None


def most_gradients(
    model: nn.Module, batch: Batch, make: Callable[[list[nn.Parameter]], object]
) -> float:
    layers = LayerMap.from_model(model)
    result = train_layers(model, layers, [True] * DEPTH, [batch], loss, make)  # type: ignore[arg-type]
    return result.memory.gradients


def test_one_gradient_is_held_at_a_time(chain: nn.Module, batch: Batch) -> None:
    assert most_gradients(chain, batch, partial(LocalSGD, lr=0.1)) == MB
    assert most_gradients(Chain(), batch, partial(LocalAdamW, lr=0.1)) == MB
    assert most_gradients(Chain(), batch, partial(torch.optim.SGD, lr=0.1)) > DEPTH * MB

    def clipped(parameters: list[nn.Parameter]) -> Clipped:
        return Clipped(LocalSGD(parameters, 0.1), parameters, 1.0)

    assert most_gradients(Chain(), batch, clipped) > DEPTH * MB


def test_the_optimisers_state_is_that_of_trained_tensors(chain: nn.Module, batch: Batch) -> None:
    layers = LayerMap.from_model(chain)
    sizes = {}
    for name, make in (
        ("plain", partial(LocalSGD, lr=0.1)),
        ("momentum", partial(LocalSGD, lr=0.1, momentum=0.9)),
        ("adamw", partial(LocalAdamW, lr=0.1)),
        ("torch", partial(torch.optim.AdamW, lr=0.1)),
    ):
        model = Chain()
        mask = [False] * (DEPTH - 1) + [True]
        sizes[name] = train_layers(model, layers, mask, [batch], loss, make).memory.optimizer
    own = MB + layers.head.bytes
    assert sizes["plain"] == 0
    assert sizes["momentum"] == own
    assert sizes["adamw"] == 2 * own
    assert 2 * own <= sizes["torch"] <= 2 * own + 64


@pytest.mark.parametrize("make", [partial(LocalAdamW, lr=0.1), partial(torch.optim.AdamW, lr=0.1)])
def test_the_peak_is_that_of_a_step_with_the_whole_state(
    chain: nn.Module, batch: Batch, make: OptimizerFn
) -> None:
    """Two steps by one optimiser, of which the second finds the state when it begins."""
    layers = LayerMap.from_model(chain)
    with selected_layers(chain, layers, layers.names):
        parameters = list(chain.parameters())
        stepper = Stepper(chain, parameters, loss, make, Step())
        _, first = stepper.measured(batch, 0.0)
        moments = [t for t in tree_leaves(dict(stepper.optimizer.state)) if torch.is_tensor(t)]  # type: ignore[attr-defined]
        with LiveBytes((*parameters, *batch.values(), *moments)) as stepper.live:
            stepper(batch)
    state = sum(tensor.nbytes for tensor in moments)
    assert first.optimizer == state >= 2 * sum(p.nbytes for p in parameters)
    second = stepper.live.phases(0.0).peak + state
    assert first.peak == pytest.approx(second, rel=0.05)


def test_recomputation_keeps_less(batch: Batch) -> None:
    large = {"x": batch["x"].repeat(64, 1), "label": batch["label"].repeat(64)}
    mask = [True] * DEPTH
    found = []
    for how in (Step(), Step(checkpointing=True), Step(micro_batch=64)):
        torch.manual_seed(0)
        model = Chain(dropout=0.5)
        layers = LayerMap.from_model(model)
        result = train_layers(
            model, layers, mask, [large], loss, partial(LocalSGD, lr=0.1), how=how
        )
        found.append(result.memory.activations)
    assert found[1] < 0.8 * found[0]
    assert found[2] < 0.2 * found[0]


def test_live_bytes_count_what_lives(chain: nn.Module) -> None:
    x = torch.zeros(1000)
    with LiveBytes([x]) as live:
        y = x + 1
        z = y * 2
        del y
        z.view(10, 100)
        x.add_(1)
    assert live.phases(5.0) == Phases(5.0, 8000.0, 0.0, 0.0, 8005.0)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["head only", "top", "middle", "bottom", "all"])
@pytest.mark.parametrize("make", [partial(LocalSGD, lr=0.1), partial(LocalAdamW, lr=0.1)])
def test_a_step_is_predicted_without_weights(
    batch: Batch, storage: str, name: str, make: OptimizerFn
) -> None:
    from layerfed.client.resident import ResidentModel

    layers = LayerMap.from_model(Chain())
    mask = masks_named(DEPTH)[name]
    resident = ResidentModel(Chain, LayerMap.from_model, torch.device("cpu"), storage)  # type: ignore[arg-type]
    with resident.borrowed(layers.trained(mask)):
        measured = train_layers(resident.model, layers, mask, [batch], loss, make).memory
    found = predicted_step(
        Chain().to("meta"),
        layers,
        mask,
        {key: tensor.to("meta") for key, tensor in batch.items()},
        loss,
        make,
        how=Step(),
        storage=storage,
    )
    assert found.peak == pytest.approx(measured.peak, rel=0.15)
    assert asdict(found).keys() == asdict(measured).keys()
    assert found.gradients == measured.gradients
    assert found.optimizer == measured.optimizer


@pytest.mark.parametrize(
    "mask", [(0, 0, 0, 0), (0, 0, 0, 1), (1, 0, 0, 0), (0, 1, 0, 1), (1, 1, 1, 1)]
)
def test_the_flops_of_a_step_are_the_closed_form(
    chain: nn.Module, batch: Batch, mask: Sequence[int]
) -> None:
    """Forward of all; below the lowest trained block nothing; weight gradients of trained ones only."""
    layers = LayerMap.from_model(chain)
    forward = [2 * ROWS * 8 * WIDTH, *[2 * ROWS * WIDTH * WIDTH] * DEPTH, 2 * ROWS * WIDTH * 3]
    chosen = [False, *map(bool, mask), True]
    low = chosen.index(True)
    expected = (
        sum(forward)
        + sum(forward[low + 1 :])
        + sum(f for f, on in zip(forward, chosen, strict=True) if on)
    )
    result = train_layers(
        chain, layers, [bool(m) for m in mask], [batch], loss, partial(LocalSGD, lr=0.1)
    )
    assert result.flops == expected


def test_nothing_below_the_lowest_trained_block_is_kept(chain: nn.Module, batch: Batch) -> None:
    layers = LayerMap.from_model(chain)
    kept: list[Tensor] = []
    with (
        selected_layers(chain, layers, layers.trained([False, False, False, True])),
        saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t),
    ):
        loss(chain, batch)
    weights = {name: chain.get_parameter(f"{name}.weight") for name in ("blocks.2.linear", "head")}
    pointers = {t.untyped_storage().data_ptr() for t in kept}
    assert weights["head"].untyped_storage().data_ptr() in pointers
    assert weights["blocks.2.linear"].untyped_storage().data_ptr() not in pointers


def test_auto_takes_bfloat16_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported", "_is_arm_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert chosen_precision("auto", cpu) == "float32"
    assert chosen_precision("bfloat16", cpu) == "bfloat16"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert chosen_precision("auto", cpu) == "bfloat16"
    for has in (True, False):
        monkeypatch.setattr(
            devices.torch.cuda, "is_bf16_supported", lambda including_emulation=True, h=has: h
        )
        assert chosen_precision("auto", cuda) == ("bfloat16" if has else "float32")
    assert chosen_precision("auto", torch.device("mps")) == "float32"


def test_a_run_leaves_its_memory_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Step] = []
    original = training.train_layers

    def spy(*args: object, how: Step, **more: object) -> object:
        asked.append(how)
        return original(*args, how=how, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "train_layers", spy)
    config = configured(
        "task.name=tests.tiny_task:TinyTask", "train.checkpointing=true", "strategy.name=top"
    )
    record = run(config).rounds[0]
    found = {name: value for name, value in record.numbers.combined().items() if "memory_" in name}
    weights = found["memory_weights"]
    assert weights is not None
    assert weights > 0
    assert {how.checkpointing for how in asked} == {True}
    with pytest.raises(ConfigError, match=r"train\.micro-batch = 3: .* has BatchNorm"):
        workbench(
            configured(
                "task.name=tests.tiny_task:TinyTask",
                "train.micro-batch=3",
                "model.batch-norm=trained",
            ).to_flat()
        )


class Wide:
    """A task whose examples have `width` numbers each, of which its model makes four times as many."""

    def __init__(self, width: int) -> None:
        self.width = width

    def largest_batch(self, size: int) -> Batch | None:
        return {"x": torch.empty(size, self.width, device="meta")} if self.width else None

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"])


@pytest.mark.parametrize(
    ("width", "rows"), [(0, 256), (8, 256), (1000, 16), (16_000, 1), (100_000, 1)]
)
def test_an_evaluation_takes_as_many_rows_as_fit(
    width: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CPU_ACTIVATIONS", 4 * 4 * 16_001)
    model = nn.Sequential(Repeat(), nn.Flatten()).train()
    found = rows_that_fit(Wide(width), model, torch.device("cpu"))  # type: ignore[arg-type]
    assert found == rows


class Repeat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 4)
