"""Every tensor of every model family in exactly one layer, and the right one."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionViT
from torchvision.models import densenet121, resnet18, resnet50, vgg11
from torchvision.models.swin_transformer import SwinTransformer

from layerfed.layers import LayerMap, LayerMapError, digest, fingerprint

TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "vocab_size": 40,
    "max_position_embeddings": 20,
}
TIMM = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_classes": 5}
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
    "BERT of one layer": (
        lambda: tf.BertForSequenceClassification(tf.BertConfig(**{**TEXT, "num_hidden_layers": 1})),
        1,
        {"bert.embeddings.word_embeddings.weight"},
        {
            "bert.pooler.dense.weight",
            "bert.pooler.dense.bias",
            "classifier.weight",
            "classifier.bias",
        },
    ),
    "BERT with a masked-language head": (
        lambda: tf.BertForMaskedLM(tf.BertConfig(**TEXT)),
        3,
        {"bert.embeddings.word_embeddings.weight"},
        {
            "cls.predictions.bias",
            *(
                f"cls.predictions.transform.{n}.{t}"
                for n in ("dense", "LayerNorm")
                for t in ("weight", "bias")
            ),
        },
    ),
    "DistilBERT": (
        lambda: tf.DistilBertForSequenceClassification(
            tf.DistilBertConfig(vocab_size=40, dim=16, n_layers=3, n_heads=2, hidden_dim=20)
        ),
        3,
        {"distilbert.embeddings.word_embeddings.weight"},
        {f"{n}.{t}" for n in ("pre_classifier", "classifier") for t in ("weight", "bias")},
    ),
    "ALBERT, one layer used three times": (
        lambda: tf.AlbertForSequenceClassification(tf.AlbertConfig(**TEXT, embedding_size=8)),
        1,
        {"albert.encoder.embedding_hidden_mapping_in.weight"},
        {f"{n}.{t}" for n in ("albert.pooler", "classifier") for t in ("weight", "bias")},
    ),
    "GPT-2": (
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=40, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0
            )
        ),
        3,
        {"transformer.wte.weight", "transformer.wpe.weight"},
        {"transformer.ln_f.weight", "transformer.ln_f.bias"},
    ),
    "LLaMA of one layer": (
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**{**TEXT, "num_hidden_layers": 1})),
        1,
        {"model.embed_tokens.weight"},
        {"model.norm.weight", "lm_head.weight"},
    ),
    "Mixtral": (
        lambda: tf.MixtralForCausalLM(
            tf.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4)
        ),
        3,
        {"model.embed_tokens.weight"},
        {"model.norm.weight", "lm_head.weight"},
    ),
    "BEiT": (
        lambda: timm.models.Beit(**TIMM, depth=3, num_heads=2, use_shared_rel_pos_bias=True),
        3,
        {"cls_token", "patch_embed.proj.weight"},
        {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"},
    ),
    "DeiT": (
        lambda: timm.models.deit.VisionTransformerDistilled(**TIMM, depth=3, num_heads=2),
        3,
        {"cls_token", "dist_token"},
        {f"{n}.{t}" for n in ("norm", "head", "head_dist") for t in ("weight", "bias")},
    ),
    "MLP-Mixer": (
        lambda: timm.models.MlpMixer(**TIMM, num_blocks=3),
        3,
        {"stem.proj.weight"},
        {"norm.weight", "norm.bias", "head.weight", "head.bias"},
    ),
    "torchvision ViT": (
        lambda: TorchvisionViT(16, 8, 3, 2, 16, 20, num_classes=5),
        3,
        {"class_token", "conv_proj.weight", "encoder.pos_embedding"},
        {"encoder.ln.weight", "encoder.ln.bias", "heads.head.weight", "heads.head.bias"},
    ),
    "ResNet-18 of timm": (
        lambda: timm.create_model("resnet18"),
        8,
        {"conv1.weight", "bn1.weight", "bn1.bias"},
        {"fc.weight", "fc.bias"},
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


class Block(nn.Module):
    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.out = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(experts))


class OtherBlock(Block):
    pass


class Net(nn.Module):
    """The parts, by name, in this order."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def stack(*members: nn.Module) -> nn.ModuleList:
    return nn.ModuleList(members)


def blocks(number: int) -> nn.ModuleList:
    return stack(*(Block() for _ in range(number)))


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


def mlp(depth: int) -> nn.Module:
    return nn.Sequential(*(m for _ in range(depth) for m in (linear(), nn.ReLU())))


def two_stacks(encoder: type[Block] = Block, decoder: type[Block] = Block) -> nn.Module:
    return Net(
        embed=linear(),
        encoder=Net(layers=stack(*(encoder() for _ in range(3)))),
        decoder=Net(layers=stack(*(decoder() for _ in range(2)))),
        head=linear(),
    )


def swin() -> nn.Module:
    return SwinTransformer([2, 2], 8, [1, 2, 1], [1, 2, 2], [4, 4], num_classes=3)


def tied(first: str, second: str) -> nn.Module:
    """Three blocks, with one parameter in two places."""
    model = Net(
        lm_head=linear(), embed=linear(), blocks=blocks(3), norm=nn.LayerNorm(4), out=linear()
    )
    model.get_submodule(second).weight = model.get_submodule(first).weight
    return model


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


def test_another_model_does_not_pass_the_check() -> None:
    with pytest.raises(LayerMapError, match=r"lacks bn1.bias.*has blocks.0.attn.proj.bias"):
        LayerMap.from_model(resnet18()).check(timm_vit())
    wide = r"other shapes: cls_token \(1, 1, 32\) instead of \(1, 1, 16\)"
    with pytest.raises(LayerMapError, match=wide):
        LayerMap.from_model(timm_vit()).check(timm_vit(embed_dim=32))


@given(st.integers(0, 2**16), st.sampled_from(["float32", "float16", "int64", "bool"]))
def test_a_digest_follows_content_alone(seed: int, dtype: str) -> None:
    values = (np.random.default_rng(seed).standard_normal((3, 4)) * 100).astype(dtype)
    base = digest({"w": values})
    assert digest({"w": torch.from_numpy(values.copy())}) == base
    assert digest({"w": np.asfortranarray(values)}) == base
    assert digest({"w": values.astype(values.dtype.newbyteorder(">"))}) == base
    assert digest({"w": values, "v": values}) == digest({"v": values, "w": values})
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


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.complex64])
def test_a_digest_needs_no_type_of_numpy(dtype: torch.dtype) -> None:
    ones = torch.ones(2, 3).to(dtype)
    assert digest({"w": ones}) == digest({"w": ones.clone().requires_grad_(True)})
    assert digest({"w": ones.t()}) == digest({"w": ones.t().contiguous()})
    assert digest({"w": ones}) != digest({"w": torch.zeros(2, 3).to(dtype)})


def test_a_digest_copies_nothing_that_is_contiguous() -> None:
    values = np.zeros(2**20)
    tracemalloc.start()
    digest({"w": values, "v": torch.from_numpy(values)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < values.nbytes / 10
