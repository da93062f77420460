"""A skipped block costs nothing, and the rest is the shallower network to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import transformers
from torch import Tensor, nn

from layerfed.client.flops import counted
from layerfed.client.local_optimizers import LocalSGD
from layerfed.client.prediction import predicted_step
from layerfed.client.probe import probe_layers
from layerfed.client.skipping import now_skipped, skipped
from layerfed.client.training import Step, train_layers
from layerfed.models.layers import LayerMap
from layerfed.task.base import Batch
from tests.conftest import TinyNet, cross_entropy
from tests.models.zoo import ZOO
from tests.small_models import timm_vit

RUNS = [True, False, True, True]
MASK = [False, False, True, False]


def scores(model: nn.Module) -> Tensor:
    found: Tensor = model(torch.linspace(-1, 1, 40).view(8, 5))
    return found


def image_loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["label"])


def images() -> list[Batch]:
    rng = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(4, 3, 32, 32, generator=rng), "label": torch.tensor([0, 1, 2, 3])}]


def local(parameters: list[nn.Parameter]) -> LocalSGD:
    return LocalSGD(parameters, 0.1)


def vit(depth: int) -> nn.Module:
    return timm_vit(depth=depth)


def split(model: nn.Module, loss: Callable[..., Tensor] = image_loss) -> LayerMap:
    return LayerMap.from_model(model, forward=lambda m: m(images()[0]["x"]))


def shallower(deep: nn.Module, runs: Sequence[bool]) -> nn.Module:
    """A network that has only the blocks that run, with the same weights."""
    found = vit(sum(runs))
    kept = [str(i) for i, on in enumerate(runs) if on]
    state = {}
    for name, value in deep.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            if parts[1] not in kept:
                continue
            parts[1] = str(kept.index(parts[1]))
        state[".".join(parts)] = value.clone()
    found.load_state_dict(state)
    return found


def test_training_and_probing_are_those_of_the_shallower_network() -> None:
    """Weights, loss, statistics, FLOPs and memory."""
    torch.manual_seed(0)
    deep = vit(4)
    small = shallower(deep, RUNS)
    layers, fewer = split(deep), split(small)
    assert len(layers.skippable) == 4
    kept = [i for i, on in enumerate(RUNS) if on]
    names = ["grad_norm_sq", "fisher"]
    whole, _ = probe_layers(deep, layers, images(), image_loss, names)
    with skipped(deep, layers, RUNS):
        found, flops = probe_layers(deep, layers, images(), image_loss, names)
        result = train_layers(deep, layers, MASK, images(), image_loss, local)
    expected, fewer_flops = probe_layers(small, fewer, images(), image_loss, names)
    for name in names:
        assert [found[name][i] for i in kept] == pytest.approx(expected[name])
        assert found[name][1] == 0.0 < whole[name][1]
    assert flops == fewer_flops
    mask = [on for on, runs in zip(MASK, RUNS, strict=True) if runs]
    same = train_layers(small, fewer, mask, images(), image_loss, local)
    assert (result.loss, result.flops) == (pytest.approx(same.loss), same.flops)
    assert result.memory.activations == same.memory.activations
    for name, value in shallower(deep, RUNS).state_dict().items():
        torch.testing.assert_close(value, small.state_dict()[name], msg=name)
    deeper = train_layers(deep, layers, MASK, images(), image_loss, local)
    assert result.flops < deeper.flops
    # The block between the lowest in training and the head keeps nothing for backward.
    low, runs = [True, False, False, False], [True, False, True, True]
    full = train_layers(deep, layers, low, images(), image_loss, local).memory.activations
    with skipped(deep, layers, runs):
        assert (
            train_layers(deep, layers, low, images(), image_loss, local).memory.activations < full
        )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_of_a_step_is_predicted(checkpointing: bool) -> None:
    how, low = Step(checkpointing=checkpointing), [True, False, False, False]
    model, skeleton = vit(4), vit(4).to("meta")
    layers = split(model)
    with skipped(model, layers, RUNS):
        measured = train_layers(model, layers, low, images(), image_loss, local, how=how).memory
    batch = {name: tensor.to("meta") for name, tensor in images()[0].items()}
    with skipped(skeleton, layers, RUNS):
        predicted = predicted_step(
            *(skeleton, layers, low, batch, image_loss, local), how=how, storage="float32"
        )
    assert predicted.activations == measured.activations
    assert predicted.gradients == measured.gradients


@pytest.mark.parametrize(
    "name", ["timm/vit", "timm/convmixer", "timm/swin", "transformers/bert", "transformers/llama"]
)
def test_blocks_found_by_shape_can_be_skipped(name: str) -> None:
    if name.startswith("transformers/"):
        config = transformers.AutoConfig.for_model(
            name.removeprefix("transformers/"),
            **{"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2},
            **{"intermediate_size": 20, "vocab_size": 40, "num_key_value_heads": 2},
            pad_token_id=0,
        )
        model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        ids = torch.tensor([[5, 6, 7, 8]])

        def run(net: nn.Module) -> Tensor:
            found: Tensor = net(input_ids=ids).logits
            return found

    else:
        model, run = ZOO[name].build().eval(), ZOO[name].scores
    layers = LayerMap.from_model(model, forward=run)
    assert len(layers.skippable) == layers.num_blocks
    with torch.no_grad():
        before = run(model)
        for each in layers.blocks:
            with skipped(model, layers, [block != each for block in layers.blocks]):
                assert now_skipped(model) == (each.name,)
                assert not torch.equal(run(model), before)
        assert now_skipped(model) == ()
        assert torch.equal(run(model), before)


class Narrowing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))  # of the same shape, but not residual


class Scaled(nn.Module):
    """A residual block that gets a number and another tensor beside its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, number: int, x: Tensor, scale: Tensor) -> Tensor:
        return x + number * torch.tanh(self.linear(x)) * scale


class Conditioned(TinyNet):
    def __init__(self, *, scale_first: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Scaled() for _ in range(3))
        self.scale_first = scale_first
        self.condition = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        scale, x = self.condition(x), self.embed(x)
        for number, block in enumerate(self.blocks):
            named = {"x": x, "scale": scale}
            order = ("scale", "x") if self.scale_first else ("x", "scale")
            x = block(number=number, **{name: named[name] for name in order})
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def test_the_input_that_goes_on_is_the_one_that_a_block_adds_to() -> None:
    model = Conditioned(scale_first=False)
    layers = LayerMap.from_model(model, forward=scores)
    assert len(layers.skippable) == 3
    with torch.no_grad(), skipped(model, layers, [True, True, False]):
        found = scores(model)
    del model.blocks[2]
    with torch.no_grad():
        assert torch.equal(found, scores(model))
    # Its first tensor is not the one that it adds to.
    assert not LayerMap.from_model(Conditioned(scale_first=True), forward=scores).skippable


def test_a_block_that_adds_nothing_to_its_input_cannot_be_skipped() -> None:
    model = TinyNet()
    model.blocks[2] = Narrowing()
    layers = LayerMap.from_model(model, blocks="blocks.*", forward=scores)
    assert set(layers.skippable) == {"blocks.0", "blocks.1", "blocks.3"}
    with pytest.raises(ValueError, match=r"skip blocks\.2"), skipped(model, layers, [1, 1, 0, 1]):
        pass
    with pytest.raises(ValueError, match="shorter"), skipped(model, layers, [True]):
        pass


def test_flops_of_a_skip_are_not_taken_for_those_of_the_whole(batches: list[Batch]) -> None:
    model = TinyNet()
    layers = LayerMap.from_model(model, forward=scores)

    def step() -> float:
        return counted(model, "one", batches[0], lambda: cross_entropy(model, batches[0]))[1]

    whole = step()
    with skipped(model, layers, [True, False, False, True]):
        assert step() < whole
    assert step() == whole
