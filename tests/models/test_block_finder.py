"""Which modules are the blocks: the search, the patterns that override it, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn
from torchvision.models import densenet121, resnet18, vgg11

from layerfed.models.layers import LayerMap, LayerMapError
from tests.small_models import (
    Block,
    Net,
    OtherBlock,
    blocks,
    clip,
    linear,
    mlp,
    stack,
    swin,
    tied,
    timm_vit,
    two_stacks,
)


def test_patterns_override_the_search() -> None:
    layers = LayerMap.from_model(resnet18(), blocks="layer3.*, layer4.*")
    assert [block.modules for block in layers.blocks] == [
        ("layer3.0",),
        ("layer3.1",),
        ("layer4.0",),
        ("layer4.1",),
    ]
    assert "layer2.0.conv1.weight" in layers.embeddings.parameters

    layers = LayerMap.from_model(resnet18(), blocks="layer1.*, layer2.*", head=["layer3", "layer4"])
    assert layers.num_blocks == 4
    assert "layer3.0.conv1.weight" in layers.head.parameters

    layers = LayerMap.from_model(mlp(3), blocks="2")
    assert layers.embeddings.parameters == ("0.weight", "0.bias")
    assert layers.head.parameters == ("4.weight", "4.bias")


@pytest.mark.parametrize("head", [["cls_token", "patch_embed"], "cls_token, patch_embed"])
def test_more_of_the_head_can_be_named(head: str | list[str]) -> None:
    layers = LayerMap.from_model(timm_vit(), head=head)
    assert {"cls_token", "patch_embed.proj.weight"} <= set(layers.head.parameters)
    assert "pos_embed" in layers.embeddings.parameters


@pytest.mark.parametrize("blocks", [None, "blocks.*"])
def test_what_is_named_in_the_head_is_in_no_block(blocks: str | None) -> None:
    layers = LayerMap.from_model(timm_vit(), blocks=blocks, head="blocks.2, blocks.1.norm1")
    assert [block.modules[0] for block in layers.blocks] == ["blocks.0", "blocks.1.attn"]
    assert "blocks.1.norm1.weight" in layers.head.parameters
    assert {"blocks.2", "blocks.1.norm1"} <= set(layers.head.modules)


def test_a_block_that_is_used_again_is_one_block() -> None:
    block = Block()
    model = Net(embed=linear(), blocks=stack(block, block, block), head=linear())
    for pattern in (None, "blocks.*"):
        layers = LayerMap.from_model(model, blocks=pattern)
        assert [block.modules for block in layers.blocks] == [("blocks.0",)]
        assert layers.head.parameters == ("head.weight", "head.bias")
        assert layers.layer_of("blocks.2.mix.weight") is layers.blocks[0]


def test_a_model_that_holds_itself_twice_is_split_once() -> None:
    trunk = Net(embed=linear(), blocks=blocks(3))
    layers = LayerMap.from_model(Net(trunk=trunk, again=Net(inner=trunk), head=linear()))
    assert [block.modules[0] for block in layers.blocks] == [f"trunk.blocks.{i}" for i in range(3)]
    assert layers.embeddings.parameters == ("trunk.embed.weight", "trunk.embed.bias")


def test_a_list_of_blocks_may_be_of_several_classes() -> None:
    model = Net(embed=linear(), blocks=stack(Block(), OtherBlock(), Block()), head=linear())
    assert LayerMap.from_model(model).num_blocks == 3


def test_experts_in_a_block_and_a_small_stem_are_not_the_blocks() -> None:
    experts = Net(
        embed=linear(), blocks=stack(*(Block(experts=8) for _ in range(3))), head=linear()
    )
    assert LayerMap.from_model(experts).num_blocks == 3

    unit = lambda: nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU())  # noqa: E731
    stem = Net(stem=stack(*(unit() for _ in range(4))), blocks=blocks(3), head=linear())
    layers = LayerMap.from_model(stem)
    assert [block.modules for block in layers.blocks] == [(f"blocks.{i}",) for i in range(3)]
    assert len(layers.embeddings.parameters) == 4


def test_a_head_tied_to_the_embeddings_is_frozen_with_them_whichever_comes_first() -> None:
    layers = LayerMap.from_model(tied("lm_head", "embed"))
    assert layers.aliases == {"embed.weight": "lm_head.weight"}
    assert layers.layer_of("lm_head.weight") is layers.embeddings
    assert "lm_head.weight" not in layers.head.parameters
    assert "lm_head.bias" in layers.head.parameters


@pytest.mark.parametrize(
    ("build", "blocks", "says"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)),
            None,
            ["no blocks", "model.blocks = '0'"],
        ),
        (lambda: mlp(2), None, ["no head", "model.blocks = '0' with model.head = '2'"]),
        (lambda: Net(fc=linear(), blocks=blocks(1)), None, ["no head", "registered before them"]),
        (
            clip,
            None,
            ["several stacks", "'visual.transformer.resblocks.*'", "'transformer.resblocks.*'"],
        ),
        (two_stacks, None, ["several stacks", "'encoder.layers.*'", "'decoder.layers.*'"]),
        (
            lambda: two_stacks(decoder=OtherBlock),
            None,
            ["several stacks", "'encoder.layers.*'", "as in model.blocks = 'decoder.layers.*'"],
        ),
        (
            two_stacks,
            "encoder.layers.*",
            ["follow decoder.layers.0, decoder.layers.1", "model.head = 'decoder.layers'"],
        ),
        (swin, None, ["several stacks", "'features.1.*', 'features.3.*', 'features.5.*'"]),
        (
            timm_vit,
            "blocks.0,blocks.1",
            ["follow blocks.2, which", "'blocks.0, blocks.1, blocks.2'"],
        ),
        (
            resnet18,
            "layer1,layer2",
            ["follow layer3.0, layer3.1, layer4.0", "model.head = 'layer3, layer4'"],
        ),
        (lambda: mlp(4), "2", ["follow 4, which", "model.blocks = '2, 4'", "model.head = '4'"]),
        (
            lambda: tied("blocks.0.mix", "blocks.1.mix"),
            None,
            ["blocks.1.mix.weight", "blocks.0.mix.weight", "one tensor in two layers"],
        ),
        (
            lambda: tied("blocks.0.mix", "out"),
            None,
            [
                "'out.weight' and 'blocks.0.mix.weight' are one tensor in two layers (head, blocks.0)"
            ],
        ),
        (
            lambda: Net(embed=nn.LazyLinear(4), blocks=blocks(2), head=linear()),
            None,
            ["embed.weight, embed.bias are not initialised", "run one batch"],
        ),
        (resnet18, ",", ["',' names nothing", "'encoder.layer.*'"]),
        (resnet18, "layer9.*", ["'layer9.*' matches no module", "layer1"]),
        (resnet18, "layer1, layer1.*", ["matches layer1 and layer1.0 inside it"]),
        (resnet18, "layer1.*, layer3.*", ["layer2.0.bn1.bias", "between the blocks", "model.head"]),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(
    build: Callable[[], nn.Module], blocks: str | None, says: list[str]
) -> None:
    with pytest.raises(LayerMapError) as caught:
        LayerMap.from_model(build(), blocks=blocks)
    assert [text for text in says if text not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ("hed", ["'hed' is no module or tensor", "head.bias"]),
        (["head", "clstoken"], ["'clstoken'", "cls_token"]),
        ("blocks", ["no blocks"]),
    ],
)
def test_a_head_that_does_not_exist_or_takes_all_is_refused(
    head: str | list[str], says: list[str]
) -> None:
    with pytest.raises(LayerMapError) as caught:
        LayerMap.from_model(timm_vit(), head=head)
    assert [text for text in says if text not in str(caught.value)] == []
    with pytest.raises(LayerMapError, match="leaves no blocks"):
        LayerMap.from_model(timm_vit(), blocks="blocks.*", head="blocks")


@pytest.mark.parametrize(
    ("build", "blocks"),
    [
        (lambda: mlp(2), None),
        (lambda: mlp(4), None),
        (lambda: mlp(4), "2"),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), None),
        (lambda: nn.Sequential(nn.Embedding(9, 4), nn.LSTM(4, 4)), None),
        (vgg11, None),
        (densenet121, None),
        (two_stacks, None),
        (two_stacks, "encoder.layers.*"),
        (swin, None),
        (clip, None),
        (lambda: nn.Transformer(16, 2, 2, 3, 32, batch_first=True), None),
        (resnet18, "layer1,layer2"),
        (timm_vit, "blocks.0"),
        (lambda: timm.create_model("regnety_002"), None),
        (lambda: timm.create_model("convnext_tiny"), None),
    ],
)
def test_what_an_error_proposes_works(build: Callable[[], nn.Module], blocks: str | None) -> None:
    with torch.device("meta"):
        model = build()
    with pytest.raises(LayerMapError) as caught:
        LayerMap.from_model(model, blocks=blocks)
    [proposed] = re.findall(r"as in model.blocks = '([^']*)'", str(caught.value))
    with_head = re.search(r"with model.head = '([^']*)'", str(caught.value))
    LayerMap.from_model(model, blocks=proposed, head=with_head[1] if with_head else ())
    instead = re.search(r"as in model.head = '([^']*)'", str(caught.value))
    if instead:
        LayerMap.from_model(model, blocks=blocks, head=instead[1])
