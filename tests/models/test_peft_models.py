"""Adapters of many models of transformers load in PEFT, over their base, with the same scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from layerfed.config import ConfigError, ModelConfig
from layerfed.models.adapters import insert_adapters, save_adapters
from layerfed.models.layers import LayerMap
from layerfed.models.text import build_choice_model, build_text_classifier, with_whole_output

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SMALL, "intermediate_size": 24}
LLAMA = {**WIDE, "num_key_value_heads": 2, "max_position_embeddings": 32}
OWN: dict[str, dict[str, Any]] = {
    "bert": WIDE,
    "roberta": {**WIDE, "max_position_embeddings": 40},
    "electra": {**WIDE, "embedding_size": 16},
    "mpnet": WIDE,
    "deberta-v2": WIDE,
    "distilbert": {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
    "modernbert": {**WIDE, **{f"{x}_token_id": 1 for x in ("pad", "cls", "sep", "bos", "eos")}},
    "gpt2": {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "llama": LLAMA,
    "qwen2": {**LLAMA, "tie_word_embeddings": True},
    "mistral": LLAMA,
    "opt": {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
    "gpt_neox": {**WIDE, "max_position_embeddings": 32},
}
CLASSIFIERS = ["bert", "roberta", "electra", "mpnet", "deberta-v2", "distilbert", "modernbert"]
DECODERS = ["gpt2", "llama", "qwen2", "mistral", "opt", "gpt_neox"]
IDS = torch.tensor([[5, 6, 7, 8, 9, 4]])
LETTERS = [3, 11, 30]


def checkpoint(folder: Path, name: str, kind: Any) -> ModelConfig:
    """Write a model of random weights, and return the section that names it."""
    torch.manual_seed(0)
    settings = {**OWN[name], "pad_token_id": 1, "num_labels": 3}
    config = transformers.AutoConfig.for_model(name, **settings)
    kind.from_config(config).save_pretrained(folder)
    return ModelConfig(name=f"transformers/{name}", weights=str(folder), tuning="lora", lora_rank=2)


def test_only_the_shared_adapter_is_written(tmp_path: Path) -> None:
    kind = transformers.AutoModelForSequenceClassification
    section = checkpoint(tmp_path / "base", "bert", kind)
    section = section.model_copy(update={"personal_rank": 3})
    model: Any = adapted(build_text_classifier(section, 3, 0), section)
    both = model(input_ids=IDS).logits
    (tmp_path / "made").mkdir()
    save_adapters(model, tmp_path / "made", section.weights, "SEQ_CLS")
    peft.tuners.tuners_utils.set_adapter(model, "default")
    assert not torch.allclose(model(input_ids=IDS).logits, both)
    base = kind.from_pretrained(tmp_path / "base", num_labels=3)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "made").eval()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def adapted(model: nn.Module, section: ModelConfig) -> nn.Module:
    """Return the model with adapters and head of other values, as training leaves them."""

    def forward(net: Any) -> Any:
        return net(input_ids=IDS).logits

    layers = LayerMap.from_model(model, forward=forward)
    insert_adapters(model, layers, section, 0, forward)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or name in layers.head.parameters:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("name", [*CLASSIFIERS, *DECODERS])
def test_a_classifiers_adapters_load(name: str, tmp_path: Path) -> None:
    kind = transformers.AutoModelForSequenceClassification
    section = checkpoint(tmp_path / "base", name, kind)
    model: Any = adapted(build_text_classifier(section, 3, 0), section)
    (tmp_path / "made").mkdir()
    save_adapters(model, tmp_path / "made", section.weights, "SEQ_CLS")
    base = kind.from_pretrained(tmp_path / "base", num_labels=3)
    assert not torch.allclose(base.eval()(input_ids=IDS).logits, model(input_ids=IDS).logits)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "made").eval()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("name", DECODERS)
def test_the_adapters_of_a_model_of_answers_load(name: str, tmp_path: Path) -> None:
    kind = transformers.AutoModelForCausalLM
    section = checkpoint(tmp_path / "base", name, kind)
    model: Any = adapted(build_choice_model(section, LETTERS, 0), section)
    (tmp_path / "made").mkdir()
    whole = with_whole_output(model, section, LETTERS, 0)
    save_adapters(model, tmp_path / "made", section.weights, "CAUSAL_LM", whole)
    base = kind.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "made").eval()
    found = loaded(input_ids=IDS).logits
    torch.testing.assert_close(found[..., LETTERS], model(input_ids=IDS).logits)
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "made").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, found)


class Loose(nn.Module):
    """A head with a tensor in no module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(4, 2)
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        result: torch.Tensor = self.head(x) * self.temperature
        return result


def test_a_head_that_peft_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = Loose()
    layers = LayerMap.from_model(model, forward=lambda net: net(torch.zeros(1, 4)))
    insert_adapters(model, layers, ModelConfig(tuning="lora", lora_rank=2), 0)
    with pytest.raises(ConfigError, match="cannot hold 'temperature' of the head"):
        save_adapters(model, tmp_path, "base", "SEQ_CLS")
