"""Every tensor of every model family is in exactly one layer, and in the right one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import transformers as tf
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionViT
from torchvision.models import resnet18, resnet50

from layerfed.models.layers import LayerMap
from tests.small_models import clip, timm_vit

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
