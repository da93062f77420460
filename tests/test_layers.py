"""Every tensor of every model family in exactly one layer, and the right one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import open_clip
import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import resnet18, resnet50

from layerfed.layers import LayerMap, LayerMapError, digest, fingerprint

TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "vocab_size": 40,
    "max_position_embeddings": 20,
}
VISION = {k: v for k, v in TEXT.items() if k not in ("vocab_size", "max_position_embeddings")}


def timm_vit(**options: object) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**{"depth": 3, **sizes, **options})


def clip() -> nn.Module:
    return open_clip.model.CLIP(
        embed_dim=16,
        vision_cfg={
            "layers": 3,
            "width": 64,
            "patch_size": 8,
            "image_size": 32,
            "head_width": 32,
        },
        text_cfg={"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2},
    )


class ClipClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = clip().visual
        self.head = nn.Linear(16, 3)


# name: (builder, L, some of the embeddings, exactly the head's parameters)
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int, set[str], set[str]]] = {
    "timm ViT": (
        timm_vit,
        3,
        {"cls_token", "pos_embed", "patch_embed.proj.weight"},
        {"norm.weight", "norm.bias", "head.weight", "head.bias"},
    ),
    "timm ViT with registers and pooled norm, two blocks": (
        lambda: timm_vit(depth=2, reg_tokens=2, pre_norm=True, fc_norm=True),
        2,
        {"reg_token", "norm_pre.weight"},
        {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"},
    ),
    "open_clip tower": (
        lambda: clip().visual,
        3,
        {"class_embedding", "positional_embedding", "conv1.weight", "ln_pre.weight"},
        {"proj", "ln_post.weight", "ln_post.bias"},
    ),
    "open_clip tower with a classifier": (
        ClipClassifier,
        3,
        {"tower.conv1.weight"},
        {"tower.proj", "tower.ln_post.weight", "tower.ln_post.bias", "head.weight", "head.bias"},
    ),
    "BERT": (
        lambda: tf.BertForSequenceClassification(tf.BertConfig(**TEXT)),
        3,
        {"bert.embeddings.word_embeddings.weight", "bert.embeddings.LayerNorm.weight"},
        {
            "bert.pooler.dense.weight",
            "bert.pooler.dense.bias",
            "classifier.weight",
            "classifier.bias",
        },
    ),
    "BERT of two layers, fewer than its embeddings": (
        lambda: tf.BertForSequenceClassification(tf.BertConfig(**{**TEXT, "num_hidden_layers": 2})),
        2,
        {"bert.embeddings.token_type_embeddings.weight"},
        {
            "bert.pooler.dense.weight",
            "bert.pooler.dense.bias",
            "classifier.weight",
            "classifier.bias",
        },
    ),
    "RoBERTa": (
        lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**TEXT)),
        3,
        {"roberta.embeddings.position_embeddings.weight"},
        {f"classifier.{n}.{t}" for n in ("dense", "out_proj") for t in ("weight", "bias")},
    ),
    "XLM-R": (
        lambda: tf.XLMRobertaForSequenceClassification(tf.XLMRobertaConfig(**TEXT)),
        3,
        {"roberta.embeddings.word_embeddings.weight"},
        {f"classifier.{n}.{t}" for n in ("dense", "out_proj") for t in ("weight", "bias")},
    ),
    "LLaMA": (
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)),
        3,
        {"model.embed_tokens.weight"},
        {"model.norm.weight", "lm_head.weight"},
    ),
    "LLaMA with tied embeddings": (
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, tie_word_embeddings=True)),
        3,
        {"model.embed_tokens.weight"},
        {"model.norm.weight"},
    ),
    "transformers ViT": (
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION, image_size=32, patch_size=8)),
        3,
        {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"},
        {"vit.layernorm.weight", "vit.layernorm.bias", "classifier.weight", "classifier.bias"},
    ),
    "ResNet-18": (resnet18, 8, {"conv1.weight", "bn1.weight"}, {"fc.weight", "fc.bias"}),
    "ResNet-50": (resnet50, 16, {"conv1.weight", "bn1.weight"}, {"fc.weight", "fc.bias"}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_family_is_in_the_right_layer(family: str) -> None:
    build, num_blocks, embeddings, head = FAMILIES[family]
    model = build()
    layers = LayerMap.from_model(model)

    assert layers.num_blocks == num_blocks
    assert layers.names == ("embeddings", *(f"blocks.{i}" for i in range(num_blocks)), "head")
    assert embeddings <= set(layers.embeddings.parameters)
    assert set(layers.head.parameters) == head

    held = [name for x in layers.layers for name in (*x.parameters, *x.buffers)]
    assert sorted(held) == sorted(
        name for name, _ in (*model.named_parameters(), *model.named_buffers())
    )
    travelling = {name for x in layers.layers for name in x.tensors}
    assert travelling == set(model.state_dict()) - set(layers.aliases)
    assert sum(x.elements for x in layers.layers) == sum(p.numel() for p in model.parameters())
    state = model.state_dict()
    assert sum(x.bytes for x in layers.layers) == sum(
        state[name].numel() * state[name].element_size() for name in travelling
    )
    sizes = {block.elements for block in layers.blocks}
    assert len(sizes) == 1 or family.startswith("ResNet")
    layers.check(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_cover_every_layer_and_no_module_is_in_two(family: str) -> None:
    model = FAMILIES[family][0]()
    layers = LayerMap.from_model(model)
    modules = dict(model.named_modules())
    seen: set[int] = set()
    for layer in layers.layers:
        for name in layer.modules:
            inside = {id(m) for m in modules[name].modules()}
            assert not inside & seen, name
            seen |= inside
            for tensor, _ in modules[name].named_parameters():
                assert layers.layer_of(f"{name}.{tensor}") in (layer, layers.embeddings)
    for block in layers.blocks:
        assert len(block.modules) == 1
    dropouts = {id(m) for m in model.modules() if isinstance(m, nn.Dropout)}
    assert dropouts <= seen


def test_tied_weights_stand_once_under_their_first_name() -> None:
    model = FAMILIES["LLaMA with tied embeddings"][0]()
    layers = LayerMap.from_model(model)
    assert layers.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert layers.layer_of("lm_head.weight") is layers.embeddings


def test_patterns_override_the_search() -> None:
    layers = LayerMap.from_model(resnet18(), blocks="layer1.*, layer2.*")
    assert [block.modules for block in layers.blocks] == [
        ("layer1.0",),
        ("layer1.1",),
        ("layer2.0",),
        ("layer2.1",),
    ]
    assert "layer3.0.conv1.weight" in layers.head.parameters

    mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    layers = LayerMap.from_model(mlp, blocks="2")
    assert layers.embeddings.parameters == ("0.weight", "0.bias")
    assert layers.head.parameters == ("4.weight", "4.bias")


def test_more_of_the_head_can_be_named() -> None:
    layers = LayerMap.from_model(timm_vit(), head=["cls_token", "patch_embed"])
    assert {"cls_token", "patch_embed.proj.weight"} <= set(layers.head.parameters)
    assert "pos_embed" in layers.embeddings.parameters


class TwoStacks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        block = lambda: nn.Sequential(nn.Linear(2, 2))  # noqa: E731
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(block() for _ in range(3))
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(2, 2)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
        self.blocks[1][0].weight = self.blocks[0][0].weight
        self.head = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("build", "blocks", "says"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)),
            None,
            ["no blocks", "model.blocks"],
        ),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), None, ["no head", "model.head"]),
        (
            clip,
            None,
            ["several stacks", "visual.transformer.resblocks.0", "transformer.resblocks.0"],
        ),
        (TwoStacks, None, ["several stacks", "encoder …", "encoder.layers.0 …"]),
        (Shared, None, ["blocks.1.0.weight", "blocks.0.0.weight", "one tensor in two layers"]),
        (resnet18, "layer9.*", ["'layer9.*' matches no module", "conv1"]),
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


def test_another_model_does_not_pass_the_check() -> None:
    with pytest.raises(LayerMapError, match=r"lacks bn1.bias.*has blocks.0.attn.proj.bias"):
        LayerMap.from_model(resnet18()).check(timm_vit())


@given(st.integers(0, 2**16), st.sampled_from(["float32", "float16", "int64", "bool"]))
def test_a_digest_follows_content_alone(seed: int, dtype: str) -> None:
    values = (np.random.default_rng(seed).standard_normal((3, 4)) * 100).astype(dtype)
    base = digest({"w": values})
    assert digest({"w": torch.from_numpy(values.copy())}) == base
    assert digest({"w": np.asfortranarray(values)}) == base
    assert digest({"v": values}) != base
    assert digest({"w": values.reshape(4, 3)}) != base
    changed = values.copy()
    changed.view(np.uint8).reshape(-1)[seed % values.nbytes] ^= 1
    assert digest({"w": changed}) != base


def test_digests_tell_types_and_tensors_apart() -> None:
    zeros = torch.zeros(4, dtype=torch.bfloat16)
    kinds = [zeros, zeros.half(), zeros.view(torch.int16), torch.tensor(0.0)]
    assert len({digest({"w": kind}) for kind in kinds}) == 4
    assert digest({"w": zeros, "b": zeros}) != digest({"w": zeros})
    assert fingerprint({"a": "1", "b": "2"}) == fingerprint({"b": "2", "a": "1"})
    assert fingerprint({"a": "1", "b": "2"}) != fingerprint({"a": "2", "b": "1"})
