"""Many architectures in tiny sizes with random weights, each with an example that it scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import open_clip
import timm
import torch
import torchvision.models as tv
import transformers as tf
from torch import Tensor, nn

__all__ = ["ZOO", "Entry"]


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes
    ----------
    build : Callable[[], nn.Module]
    example : Mapping[str, Tensor]
        One made-up example; an image is the first argument, and tokens go by name.
    split : Mapping[str, str]
        How the user overrides the search: `blocks`, `head`, `embeddings`.
    """

    build: Callable[[], nn.Module]
    example: Mapping[str, Tensor]
    split: Mapping[str, str] = field(default_factory=dict)

    def scores(self, model: nn.Module) -> Tensor:
        """Return the model's scores of the example, as a matrix with a row for each example."""
        device = next(model.parameters()).device
        example = {name: tensor.to(device) for name, tensor in self.example.items()}
        image = example.pop("image", None)
        result: Any = model(image) if image is not None else model(**example)
        for name in ("logits", "logits_per_image", "last_hidden_state"):
            if hasattr(result, name):
                result = getattr(result, name)
                break
        while isinstance(result, tuple | list | dict):
            result = next(iter(result.values())) if isinstance(result, dict) else result[0]
        return result.flatten(1)


def _image(size: int) -> dict[str, Tensor]:
    return {"image": torch.linspace(-1, 1, 2 * 3 * size * size).view(2, 3, size, size)}


def _timm(name: str, size: int = 64, split: Mapping[str, str] | None = None, **more: Any) -> Entry:
    return Entry(partial(timm.create_model, name, num_classes=5, **more), _image(size), split or {})


def _vit(name: str, **more: Any) -> Entry:
    tiny = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 2}
    return _timm(name, 32, **{**tiny, **more})


def _vision(build: Callable[..., nn.Module], size: int = 64, split: Any = (), **more: Any) -> Entry:
    return Entry(partial(build, num_classes=5, **more), _image(size), dict(split))


IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 2]] * 2)
ROWS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 3,
}


def _text(
    kind: str, task: str = "SequenceClassification", /, split: Any = (), **more: Any
) -> Entry:
    def build() -> nn.Module:
        config = getattr(tf, f"{kind}Config")(**{**TEXT, **more})
        model: nn.Module = getattr(tf, f"{kind}For{task}" if task else f"{kind}Model")(config)
        return model

    return Entry(build, ROWS, dict(split))


def _other(kind: str, example: Mapping[str, Tensor], /, split: Any = (), **more: Any) -> Entry:
    def build() -> nn.Module:
        name, _, _ = kind.rpartition("For")
        config = getattr(tf, f"{name.removesuffix('Model')}Config")(**more)
        model: nn.Module = getattr(tf, kind)(config)
        return model

    return Entry(build, example, dict(split))


def _pixels(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": _image(size)["image"]}


VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
}
SOUND = {"input_values": torch.linspace(-1, 1, 2 * 800).view(2, 800)}
WAVES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "num_labels": 3,
    "layerdrop": 0.0,
}
BART = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 64,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
T5 = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 20,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "num_labels": 3,
}
WINDOWS: dict[str, Any] = {
    "image_size": 64,
    "window_size": 4,
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [1, 2],
    "num_labels": 3,
}
STAGES = {"depths": [2, 2, 2, 2], "hidden_sizes": [8, 16, 24, 32], "num_labels": 3}
PAIR = {**ROWS, "decoder_input_ids": IDS}


def _tower(image_size: int = 32, **vision: Any) -> Entry:
    def build() -> nn.Module:
        model: Any = open_clip.model.CLIP(
            embed_dim=16,
            vision_cfg={**vision, "image_size": image_size},
            text_cfg={"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2},
        )
        tower: nn.Module = model.visual
        return tower

    return Entry(build, _image(image_size))


def _gemma3n() -> Entry:
    def build() -> nn.Module:
        sizes = {"head_dim": 8, "vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 4}
        more = {"laurel_rank": 4, "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 3}
        more |= {"activation_sparsity_pattern": [0.0] * 3, "intermediate_size": [20] * 3}
        return tf.Gemma3nForCausalLM(tf.Gemma3nTextConfig(**{**TEXT, **sizes, **more}))

    return Entry(build, ROWS)


ZOO: dict[str, Entry] = {
    # ------------------------------------------------------------------ timm: plain transformers
    "timm/vit": _vit("vit_tiny_patch16_224"),
    "timm/deit3": _vit("deit3_small_patch16_224"),
    "timm/deit_distilled": _vit("deit_tiny_distilled_patch16_224"),
    "timm/beit": _vit("beit_base_patch16_224"),
    "timm/beit, shared bias": _vit("beit_base_patch16_224", use_shared_rel_pos_bias=True),
    "timm/eva02": _timm(
        "eva02_tiny_patch14_224", 28, img_size=28, embed_dim=24, depth=3, num_heads=2
    ),
    "timm/cait": _vit("cait_xxs24_224"),
    "timm/convit": _vit("convit_tiny"),
    "timm/xcit": _vit("xcit_nano_12_p16_224"),
    "timm/vit_relpos": _vit("vit_relpos_small_patch16_224"),
    "timm/vit_hybrid": _timm("vit_tiny_r_s16_p8_224", 64, img_size=64),
    "timm/samvit": _vit("samvit_base_patch16_224"),
    "timm/mixer": _timm("mixer_s32_224", 64, img_size=64),
    "timm/gmlp": _timm("gmlp_ti16_224", 64, img_size=64),
    "timm/resmlp": _timm("resmlp_12_224", 64, img_size=64),
    "timm/convmixer": _vision(partial(timm.models.ConvMixer, 24, 3, patch_size=8)),
    "timm/sequencer2d": _timm("sequencer2d_s", 56, img_size=56),
    "timm/tnt": _timm("tnt_s_patch16_224", 32, img_size=32, embed_dim=24, depth=3),
    "timm/volo": _timm("volo_d1_224", 64, img_size=64),
    "timm/crossvit": _timm("crossvit_9_240"),
    "timm/naflexvit": _timm("naflexvit_base_patch16_gap", 32, embed_dim=24, depth=3, num_heads=2),
    # ------------------------------------------------------------------------ timm: in stages
    "timm/swin": _timm("swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=12),
    "timm/swinv2": _timm("swinv2_tiny_window8_256", img_size=64, window_size=4, embed_dim=12),
    "timm/swinv2_cr": _timm("swinv2_cr_tiny_224", img_size=64, embed_dim=12, window_size=4),
    "timm/twins_svt": _timm("twins_svt_small", img_size=64),
    "timm/pvt_v2": _timm("pvt_v2_b0"),
    "timm/pit": _timm("pit_ti_224", 224),
    "timm/levit": _timm("levit_128s", img_size=64),
    "timm/coat": _timm("coat_lite_tiny", img_size=64),
    "timm/davit": _timm("davit_tiny", embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 2, 2)),
    "timm/focalnet": _timm("focalnet_tiny_srf", 32),
    "timm/gcvit": _timm("gcvit_xxtiny", img_size=64, window_size=(2, 2, 2, 2)),
    "timm/hiera": _timm("hiera_tiny_224", img_size=64, embed_dim=8),
    "timm/mvitv2": _timm("mvitv2_tiny", img_size=64),
    "timm/nest": _timm("nest_tiny", 32, img_size=32),
    "timm/maxvit": _timm("maxvit_rmlp_pico_rw_256", img_size=64),
    "timm/coatnet": _timm("coatnet_nano_rw_224", img_size=64),
    "timm/mobilevit": _timm("mobilevit_xxs"),
    "timm/mobilevitv2": _timm("mobilevitv2_050"),
    "timm/efficientformer": _timm("efficientformer_l1", 224),
    "timm/efficientvit_mit": _timm("efficientvit_b0"),
    "timm/efficientvit_msra": _timm("efficientvit_m0", 224),
    "timm/poolformer": _timm("poolformer_s12"),
    "timm/caformer": _timm("caformer_s18", 64),
    "timm/tiny_vit": _timm("tiny_vit_5m_224", 224),
    "timm/edgenext": _timm("edgenext_xx_small"),
    "timm/fastvit": _timm("fastvit_t8"),
    "timm/repvit": _timm("repvit_m0_9"),
    "timm/swiftformer": _timm("swiftformer_xs"),
    "timm/visformer": _timm("visformer_tiny", 224),
    "timm/convnext": _timm("convnext_atto", dims=(8, 16, 24, 32)),
    "timm/convnextv2": _timm("convnextv2_atto", dims=(8, 16, 24, 32)),
    "timm/inception_next": _timm("inception_next_atto"),
    "timm/mambaout": _timm("mambaout_femto"),
    "timm/resnet18": _timm("resnet18"),
    "timm/resnet26": _timm("resnet26"),
    "timm/seresnet": _timm("seresnet18" if timm.is_model("seresnet18") else "legacy_seresnet18"),
    "timm/resnetv2": _timm("resnetv2_18"),
    "timm/res2net": _timm("res2net50_14w_8s", channels=(8, 16, 24, 32)),
    "timm/resnest": _timm("resnest14d"),
    "timm/skresnet": _timm("skresnet18"),
    "timm/regnetx": _timm("regnetx_002"),
    "timm/regnety": _timm("regnety_002"),
    "timm/nfnet": _timm("nf_regnet_b0"),
    "timm/efficientnet": _timm("efficientnet_b0"),
    "timm/efficientnetv2": _timm("efficientnetv2_rw_t"),
    "timm/mobilenetv2": _timm("mobilenetv2_050"),
    "timm/mobilenetv3": _timm("mobilenetv3_small_050"),
    "timm/mobilenetv4": _timm("mobilenetv4_conv_small_050"),
    "timm/mnasnet": _timm("mnasnet_small"),
    "timm/ghostnet": _timm("ghostnet_050"),
    "timm/rexnet": _timm("rexnet_100"),
    "timm/hardcorenas": _timm("hardcorenas_a"),
    "timm/starnet": _timm("starnet_s050"),
    "timm/fasternet": _timm("fasternet_t0"),
    "timm/repvgg": _timm("repvgg_a0"),
    "timm/cspresnet": _timm("cs3darknet_s"),
    "timm/dla": _timm("dla46_c"),
    "timm/dpn": _timm("dpn48b"),
    "timm/vovnet": _timm("ese_vovnet19b_slim_dw"),
    "timm/densenet": _timm("densenet121", growth_rate=4, block_config=(2, 2, 2, 2)),
    "timm/hrnet": _timm("hrnet_w18_small"),
    "timm/hrnet, its modules": _timm(
        "hrnet_w18_small",
        64,
        {
            "blocks": "stage2.*, stage3.*, stage4.*",
            "head": "incre_modules, downsamp_modules, final_layer",
        },
    ),
    "timm/selecsls": _timm("selecsls42"),
    "timm/xception": _timm("xception41"),
    "timm/inception_v3": _timm("inception_v3", 96),
    "timm/vgg": _timm("vgg11", 64, mlp_ratio=0.01),
    "timm/vgg_bn": _timm("vgg11_bn", 64, mlp_ratio=0.01),
    # ----------------------------------------------------------------------------- torchvision
    "torchvision/resnet18": _vision(tv.resnet18),
    "torchvision/resnet50": _vision(tv.resnet50, width_per_group=8),
    "torchvision/mobilenet_v2": _vision(tv.mobilenet_v2, width_mult=0.25),
    "torchvision/mobilenet_v3": _vision(tv.mobilenet_v3_small),
    "torchvision/mnasnet": _vision(tv.mnasnet0_5),
    "torchvision/efficientnet": _vision(tv.efficientnet_b0),
    "torchvision/regnet_y": _vision(tv.regnet_y_400mf),
    "torchvision/convnext": _vision(
        partial(
            tv.ConvNeXt,
            [
                tv.convnext.CNBlockConfig(*sizes)
                for sizes in ((8, 16, 2), (16, 24, 2), (24, 32, 2), (32, None, 2))
            ],
        )
    ),
    "torchvision/swin": _vision(
        partial(tv.SwinTransformer, [4, 4], 8, [2, 2, 2], [1, 2, 2], [4, 4])
    ),
    "torchvision/maxvit": _vision(partial(tv.MaxVit, (64, 64), 8, 4, [8, 16], [1, 2], 4, 0.0), 64),
    "torchvision/vit": _vision(partial(tv.VisionTransformer, 32, 8, 3, 2, 16, 20), 32),
    "torchvision/densenet": _vision(partial(tv.DenseNet, 4, (2, 2, 2), 8)),
    "torchvision/shufflenet_v2": _vision(tv.shufflenet_v2_x0_5),
    "torchvision/squeezenet": _vision(tv.squeezenet1_1),
    "torchvision/googlenet": _vision(
        tv.googlenet, 64, {"blocks": "inception*"}, aux_logits=False, init_weights=False
    ),
    "torchvision/vgg11": _vision(partial(tv.vgg11, init_weights=False), 32),
    "torchvision/alexnet": _vision(tv.alexnet, 64),
    # --------------------------------------------------------------------- transformers: encoders
    "transformers/bert": _text("Bert"),
    "transformers/roberta": _text("Roberta"),
    "transformers/xlm_roberta": _text("XLMRoberta"),
    "transformers/electra": _text("Electra", embedding_size=8),
    "transformers/deberta": _text("Deberta"),
    "transformers/deberta_v2": _text("DebertaV2", relative_attention=True, position_buckets=8),
    "transformers/mpnet": _text("MPNet"),
    "transformers/albert": _text("Albert", embedding_size=8),
    "transformers/distilbert": _text("DistilBert", dim=16, n_layers=3, n_heads=2, hidden_dim=20),
    "transformers/camembert": _text("Camembert"),
    "transformers/modernbert": _text("ModernBert"),
    "transformers/funnel": _other(
        "FunnelForSequenceClassification",
        ROWS,
        vocab_size=40,
        block_sizes=[2, 2],
        d_model=16,
        n_head=2,
        d_head=8,
        d_inner=20,
        num_labels=3,
    ),
    "transformers/convbert": _text("ConvBert", embedding_size=8),
    "transformers/roformer": _text("RoFormer", embedding_size=16),
    "transformers/xlnet": _other(
        "XLNetForSequenceClassification",
        ROWS,
        vocab_size=40,
        d_model=16,
        n_layer=3,
        n_head=2,
        d_inner=20,
        num_labels=3,
    ),
    "transformers/fnet": Entry(_text("FNet").build, {"input_ids": IDS}),
    "transformers/mobilebert": _text("MobileBert", embedding_size=16, intra_bottleneck_size=16),
    "transformers/esm": _text("Esm", position_embedding_type="rotary"),
    "transformers/bert, masked words": _text("Bert", "MaskedLM"),
    # --------------------------------------------------------------------- transformers: decoders
    "transformers/gpt2": _other(
        "GPT2ForSequenceClassification",
        ROWS,
        vocab_size=40,
        n_embd=16,
        n_layer=3,
        n_head=2,
        pad_token_id=0,
        num_labels=3,
    ),
    "transformers/gpt_neox": _text("GPTNeoX", "CausalLM"),
    "transformers/gpt_neo": _other(
        "GPTNeoForCausalLM",
        ROWS,
        vocab_size=40,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
    ),
    "transformers/opt": _text("OPT", "CausalLM", ffn_dim=20, word_embed_proj_dim=16),
    "transformers/opt, projected": _text("OPT", "CausalLM", ffn_dim=20, word_embed_proj_dim=8),
    "transformers/bloom": _text("Bloom", "CausalLM", n_layer=3, n_head=2),
    "transformers/llama": _text("Llama", "CausalLM"),
    "transformers/mistral": _text("Mistral"),
    "transformers/mixtral": _text("Mixtral", "CausalLM", num_local_experts=4),
    "transformers/qwen2": _text("Qwen2"),
    "transformers/qwen3": _text("Qwen3", "CausalLM", head_dim=8),
    "transformers/qwen2_moe": _text(
        "Qwen2Moe",
        "CausalLM",
        num_experts=4,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    ),
    "transformers/deepseek_v3": _text(
        "DeepseekV3",
        "CausalLM",
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        moe_intermediate_size=8,
    ),
    "transformers/gemma2": _text("Gemma2", "CausalLM", head_dim=8),
    "transformers/gemma3n": _gemma3n(),
    "transformers/phi": _text("Phi", "CausalLM"),
    "transformers/phi3": _text("Phi3", "CausalLM"),
    "transformers/falcon": _text("Falcon", "CausalLM"),
    "transformers/stablelm": _text("StableLm", "CausalLM"),
    "transformers/mamba": _text("Mamba", "CausalLM", state_size=4),
    "transformers/jamba": _text(
        "Jamba",
        "CausalLM",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        use_mamba_kernels=False,
        mamba_d_state=4,
    ),
    "transformers/xglm": _text(
        "XGLM", "CausalLM", d_model=16, ffn_dim=20, num_layers=3, attention_heads=2
    ),
    "transformers/ctrl": _text("CTRL", n_embd=16, dff=20, n_layer=3, n_head=2, n_positions=64),
    # ------------------------------------------------------------- transformers: encoder-decoders
    "transformers/bart": _other("BartForSequenceClassification", ROWS, **BART),
    "transformers/mbart": _other("MBartForConditionalGeneration", PAIR, **BART),
    "transformers/t5": _other("T5ForConditionalGeneration", PAIR, **T5),
    "transformers/t5, encoder": _other("T5ForTokenClassification", ROWS, **T5),
    "transformers/pegasus": _other("PegasusForConditionalGeneration", PAIR, **BART),
    "transformers/led": _other(
        "LEDForConditionalGeneration",
        PAIR,
        **{
            **BART,
            "attention_window": 4,
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
        },
    ),
    # ------------------------------------------------------------ transformers: vision and sound
    "transformers/vit": _other("ViTForImageClassification", _pixels(), **VISION),
    "transformers/deit": _other("DeiTForImageClassification", _pixels(), **VISION),
    "transformers/beit": _other("BeitForImageClassification", _pixels(), **VISION),
    "transformers/dinov2": _other("Dinov2ForImageClassification", _pixels(), **VISION),
    "transformers/data2vec": _other("Data2VecVisionForImageClassification", _pixels(), **VISION),
    "transformers/siglip": _other(
        "SiglipForImageClassification",
        _pixels(),
        vision_config=VISION,
        text_config={**TEXT},
        num_labels=3,
    ),
    "transformers/swin": _other("SwinForImageClassification", _pixels(64), **WINDOWS),
    "transformers/swinv2": _other("Swinv2ForImageClassification", _pixels(64), **WINDOWS),
    "transformers/resnet": _other(
        "ResNetForImageClassification", _pixels(64), embedding_size=8, **STAGES
    ),
    "transformers/regnet": _other(
        "RegNetForImageClassification", _pixels(64), embedding_size=8, groups_width=8, **STAGES
    ),
    "transformers/convnext": _other("ConvNextForImageClassification", _pixels(64), **STAGES),
    "transformers/convnextv2": _other("ConvNextV2ForImageClassification", _pixels(64), **STAGES),
    "transformers/mobilenet_v2": _other(
        "MobileNetV2ForImageClassification", _pixels(64), depth_multiplier=0.35, num_labels=3
    ),
    "transformers/mobilevit": _other(
        "MobileViTForImageClassification", _pixels(64), image_size=64, num_labels=3
    ),
    "transformers/segformer": _other(
        "SegformerForImageClassification",
        _pixels(64),
        hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1, 2, 2, 2],
        num_labels=3,
    ),
    "transformers/pvt": _other(
        "PvtForImageClassification",
        _pixels(64),
        image_size=64,
        hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1, 2, 2, 2],
        num_labels=3,
    ),
    "transformers/poolformer": _other(
        "PoolFormerForImageClassification", _pixels(64), hidden_sizes=[8, 16, 24, 32], num_labels=3
    ),
    "transformers/wav2vec2": _other("Wav2Vec2ForSequenceClassification", SOUND, **WAVES),
    "transformers/wav2vec2, stable": _other(
        "Wav2Vec2ForSequenceClassification",
        SOUND,
        **{**WAVES, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
    ),
    "transformers/hubert": _other("HubertForSequenceClassification", SOUND, **WAVES),
    "transformers/wavlm": _other("WavLMForSequenceClassification", SOUND, **WAVES),
    "transformers/sew": _other(
        "SEWForSequenceClassification", SOUND, **{**WAVES, "squeeze_factor": 2}
    ),
    "transformers/audio_spectrogram": _other(
        "ASTForAudioClassification",
        {"input_values": torch.linspace(-1, 1, 2 * 64 * 32).view(2, 64, 32)},
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=20,
        max_length=64,
        num_mel_bins=32,
        num_labels=3,
    ),
    "transformers/whisper": _other(
        "WhisperForAudioClassification",
        {"input_features": torch.linspace(-1, 1, 2 * 8 * 40).view(2, 8, 40)},
        num_mel_bins=8,
        max_source_positions=20,
        **BART,
    ),
    "transformers/clip": _other(
        "CLIPForImageClassification",
        _pixels(),
        vision_config=VISION,
        text_config={**TEXT},
        num_labels=3,
    ),
    # ------------------------------------------------------------------------------ open_clip
    "open_clip/vit": _tower(layers=3, width=64, patch_size=8, head_width=32),
    "open_clip/resnet": _tower(layers=[1, 1, 1, 1], width=8, head_width=8),
    "open_clip/timm": _tower(
        timm_model_name="vit_tiny_patch16_224",
        timm_pool="token",
        timm_proj="linear",
        image_size=224,
    ),
    "open_clip/convnext": _tower(
        timm_model_name="convnext_atto", timm_pool="avg", timm_proj="linear"
    ),
}
