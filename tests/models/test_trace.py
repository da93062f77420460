"""The split by use: tensors go where one forward pass uses them, not where they are registered."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from layerfed.models.layers import LayerMap, LayerMapError
from layerfed.models.trace import trace
from tests.small_models import linear, two_stacks


class Used(nn.Module):
    """Three blocks whose norm and bias are registered on the wrong side of them."""

    def __init__(self) -> None:
        super().__init__()
        self.final = nn.LayerNorm(4)
        self.proj = linear()
        self.blocks = nn.ModuleList(
            nn.Sequential(linear(), nn.Sequential(linear())) for _ in range(3)
        )
        self.bias = nn.Parameter(torch.zeros(4))
        self.between = linear()
        self.unused = linear()
        self.head = linear()

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        for index, block in enumerate(self.blocks):
            if index == 1:
                x = self.between(x)
            x = block(x + self.bias)
        return self.head(self.final(x))


def forward(model: nn.Module) -> Tensor:
    scores: Tensor = model(torch.ones(2, 4))
    return scores


def test_tensors_go_where_they_are_used() -> None:
    layers = LayerMap.from_model(Used(), forward=forward)
    assert layers.embeddings.modules == ("proj", "unused")
    assert "bias" in layers.embeddings.parameters
    assert layers.head.modules == ("final", "head")
    assert [block.modules for block in layers.blocks] == [
        ("blocks.0",),
        ("blocks.1", "between"),
        ("blocks.2",),
    ]


def test_a_trace_leaves_the_model_as_it_was() -> None:
    model = Used().train()
    model.blocks[1].eval()
    model.proj.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    seen = trace(model, forward)
    assert [module.training for module in model.modules()] == modes
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["proj.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "unused" not in seen.order
    assert seen.order["final"] > seen.order["blocks.2"] > seen.order["between"]


def test_a_skeleton_is_split_as_its_model() -> None:
    with torch.device("meta"):
        skeleton = Used()
    layers = LayerMap.from_model(skeleton, forward=lambda model: model(torch.ones(2, 4)))
    assert layers == LayerMap.from_model(Used(), forward=forward)


def test_a_skeleton_that_needs_values_is_traced_with_zeros() -> None:
    def reads(model: nn.Module) -> Tensor:
        model.get_buffer("table").tolist()
        return forward(model)

    def built() -> nn.Module:
        model = Used()
        model.blocks[2][0].weight = model.blocks[0][0].weight
        model.register_buffer("table", torch.arange(3))
        return model

    with torch.device("meta"):
        skeleton = built()
    with pytest.raises(NotImplementedError, match="meta"):
        reads(skeleton)
    assert LayerMap.from_model(skeleton, forward=reads) == LayerMap.from_model(
        built(), forward=reads
    )
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}


def test_a_model_that_cannot_run_is_refused() -> None:
    def fails(model: nn.Module) -> Tensor:
        raise RuntimeError("no values")

    for device in ("meta", "cpu"):
        with (
            torch.device(device),
            pytest.raises(
                LayerMapError, match=r"cannot score an example.*: no values; choose another"
            ),
        ):
            LayerMap.from_model(Used(), forward=fails)


def test_scores_without_a_gradient_are_refused() -> None:
    with pytest.raises(LayerMapError, match=r"scores depend on none of its parameters.*no_grad"):
        LayerMap.from_model(Used(), forward=lambda model: model(torch.rand(2, 4)).detach())


class Table(nn.Module):
    """A block that makes a table in its first use, which later blocks are given, as in T5."""

    def __init__(self, *, makes: bool) -> None:
        super().__init__()
        self.mix = nn.Sequential(linear(), nn.ReLU())
        self.table = nn.Embedding(4, 4) if makes else None

    def forward(self, x: Tensor, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if table is None:
            assert self.table is not None
            table = self.table(torch.arange(4)).mean(0)
        return self.mix(x) + table, table


class Tables(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed = linear()
        self.blocks = nn.ModuleList(Table(makes=index == 0) for index in range(depth))
        self.head = linear()

    def forward(self, x: Tensor) -> Tensor:
        x, table = self.embed(x), None
        for block in self.blocks:
            x, table = block(x, table)
        return self.head(x)


def test_what_a_block_makes_for_later_ones_is_an_embedding() -> None:
    layers = LayerMap.from_model(Tables(3), forward=forward, blocks="blocks.*")
    assert layers.embeddings.parameters == (
        "embed.weight",
        "embed.bias",
        "blocks.0.table.weight",
    )
    assert layers.blocks[0].parameters == ("blocks.0.mix.0.weight", "blocks.0.mix.0.bias")
    # Nobody else reads the table of a single block.
    alone = LayerMap.from_model(Tables(1), forward=forward, blocks="blocks.*")
    assert alone.layer_of("blocks.0.table.weight") is alone.blocks[0]


@pytest.mark.parametrize("key", ["embeddings", "head"])
def test_the_user_has_the_last_word(key: str) -> None:
    layers = LayerMap.from_model(Used(), forward=forward, **{key: "blocks.2, f*al"})
    named = {"blocks.2.0.weight", "final.weight"}
    assert named <= set(getattr(layers, key).parameters)
    assert layers.num_blocks == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"head": "proj"}, "blocks.0 depends on proj.bias, proj.weight, of a layer above it"),
        ({"head": "bias"}, "leave it out of model.head"),
        (
            {"embeddings": "prj"},
            "model.embeddings = 'prj' is no module or tensor; near it are: proj",
        ),
        (
            {"blocks": "blocks.*", "embeddings": "blocks"},
            "model.embeddings = '.*' leaves no blocks to select",
        ),
        ({"blocks": "unused"}, "unused would be blocks, but the model does not call them"),
    ],
)
def test_what_would_reach_down_or_does_not_exist_is_refused(
    options: dict[str, str], says: str
) -> None:
    with pytest.raises(LayerMapError, match=says):
        LayerMap.from_model(Used(), forward=forward, **options)


class Shared(Used):
    """One tensor in two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2][0].weight = self.blocks[0][0].weight


def test_a_tensor_of_two_blocks_is_an_embedding() -> None:
    layers = LayerMap.from_model(Shared(), forward=forward)
    assert layers.aliases == {"blocks.2.0.weight": "blocks.0.0.weight"}
    assert layers.layer_of("blocks.0.0.weight") is layers.embeddings
    with pytest.raises(LayerMapError, match="one tensor in two layers"):
        LayerMap.from_model(Shared())


class Convolutions(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for width in (3, 4, 4):
            parts += [nn.Conv2d(width, 4, 1), *([norm(4)] if norm else []), nn.ReLU()]
        self.features = nn.Sequential(*parts)
        self.classifier = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2))

    def forward(self, image: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.features(image).mean((2, 3)))
        return scores


@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d])
def test_plain_convolutions_are_blocks_and_keep_their_norms(
    norm: Callable[[int], nn.Module] | None,
) -> None:
    layers = LayerMap.from_model(
        Convolutions(norm), forward=lambda model: model(torch.ones(2, 3, 2, 2))
    )
    assert layers.num_blocks == 3
    assert [len(block.parameters) for block in layers.blocks[:2]] == [4 if norm else 2] * 2
    assert "classifier.0.weight" in layers.head.parameters


def test_an_encoder_and_its_decoder_are_one_stack_if_one_follows_the_other() -> None:
    model = two_stacks()

    def in_series(model: nn.Module) -> Tensor:
        x = model.embed(torch.ones(2, 4))
        for block in (*model.encoder.layers, *model.decoder.layers):
            x = x + block(x)
        return model.head(x)

    def side_by_side(model: nn.Module) -> Tensor:
        x = y = model.embed(torch.ones(2, 4))
        for block in model.encoder.layers:
            x = x + block(x)
        for block in model.decoder.layers:
            y = y + block(y)
        return model.head(x + y)

    for block in (*model.encoder.layers, *model.decoder.layers):
        block.forward = lambda x, block=block: block.out(block.mix(x))
    assert LayerMap.from_model(model, forward=in_series).num_blocks == 5
    with pytest.raises(LayerMapError, match=r"several stacks .* as in model\.blocks"):
        LayerMap.from_model(model, forward=side_by_side)
