"""Attention and MLP as units of selection: what goes where, and that training one reaches no other."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from layerfed.client.training import train_layers
from layerfed.client.workbench import workbench
from layerfed.config import ConfigError, load_config
from layerfed.models.layers import LayerMap, LayerMapError
from layerfed_assets.vit import VisionTransformer
from tests.models.zoo import ZOO, Entry

TOKENS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
SIZES = {"vocab_size": 20, "num_labels": 3, "pad_token_id": 0}


def _bert() -> nn.Module:
    config = tf.BertConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, **SIZES
    )
    return tf.BertForSequenceClassification(config)


def _distilbert() -> nn.Module:
    config = tf.DistilBertConfig(dim=12, n_layers=2, n_heads=2, hidden_dim=24, **SIZES)
    return tf.DistilBertForSequenceClassification(config)


def _llama() -> nn.Module:
    config = tf.LlamaConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, **SIZES
    )
    return tf.LlamaForSequenceClassification(config)


class Encoder(nn.Module):
    """torch's own layers, with norms after the additions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(12, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(input_ids)).mean(dim=1))


def _shipped() -> nn.Module:
    return VisionTransformer(classes=3, size=16, patch=8, width=12, depth=2, heads=2)


MODELS: dict[str, tuple[Entry, list[set[str]]]] = {
    "bert": (
        Entry(_bert, {"input_ids": TOKENS}),
        [{"attention"}, {"intermediate", "output"}],
    ),
    "distilbert": (
        Entry(_distilbert, {"input_ids": TOKENS}),
        [{"attention"}, {"sa_layer_norm", "ffn", "output_layer_norm"}],
    ),
    "llama": (
        Entry(_llama, {"input_ids": TOKENS}),
        [{"input_layernorm", "self_attn"}, {"post_attention_layernorm", "mlp"}],
    ),
    "torch": (
        Entry(Encoder, {"image": TOKENS}),
        [{"self_attn"}, {"norm1", "linear1", "linear2", "norm2"}],
    ),
    "shipped": (
        Entry(_shipped, {"image": torch.randn(2, 3, 16, 16)}),
        [{"norm1", "attn"}, {"norm2", "mlp"}],
    ),
    "scaled": (ZOO["timm/deit3"], [{"norm1", "attn"}, {"ls1", "norm2", "mlp", "ls2"}]),
}


def parts(layers: LayerMap, whole: LayerMap) -> list[set[str]]:
    """The children of the first block that each of its two units holds."""
    prefixes = {p.rpartition(".")[0] for p in whole.blocks[0].parameters}
    root = min(prefixes, key=len)
    while not all(p.startswith(root + ".") for p in prefixes | {root + "."}):
        root = root.rpartition(".")[0]
    return [
        {p.removeprefix(root + ".").split(".")[0] for p in unit.parameters}
        for unit in layers.blocks[:2]
    ]


def split(entry: Entry, model: nn.Module, units: str = "attention-mlp") -> LayerMap:
    return LayerMap.from_model(model, forward=entry.scores, units=units, **entry.split)


@pytest.mark.parametrize("name", MODELS)
def test_norms_go_with_what_they_lead_to(name: str) -> None:
    entry, expected = MODELS[name]
    model = entry.build()
    layers, whole = split(entry, model), split(entry, model, "blocks")
    assert parts(layers, whole) == expected
    assert layers.num_blocks == 2 * whole.num_blocks
    for index, block in enumerate(whole.blocks):
        pair = layers.blocks[2 * index : 2 * index + 2]
        assert sorted(p for unit in pair for p in unit.parameters) == sorted(block.parameters)
        assert sum(unit.bytes for unit in pair) == block.bytes
    assert (layers.head, layers.embeddings) == (whole.head, whole.embeddings)


@pytest.mark.parametrize("name", MODELS)
def test_training_a_unit_moves_it_and_the_head_alone(name: str) -> None:
    entry, _ = MODELS[name]
    torch.manual_seed(0)
    model = entry.build()
    layers = split(entry, model)

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(entry.scores(model), torch.tensor([0, 1]))

    def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.5)

    for unit in range(2):
        before = {n: t.clone() for n, t in model.state_dict().items()}
        mask = [index == unit for index in range(layers.num_blocks)]
        train_layers(model, layers, mask, [{"x": torch.zeros(1)}], loss, sgd)
        moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
        assert moved & set(layers.blocks[unit].tensors)
        assert moved <= {*layers.blocks[unit].tensors, *layers.head.tensors}


def test_patterns_name_units_of_ones_own() -> None:
    entry, _ = MODELS["shipped"]
    model = entry.build()
    by_pattern = split(entry, model, "blocks.*.attn, blocks.*.mlp")
    assert by_pattern == split(entry, model)
    fine = split(entry, model, "blocks.*.attn, blocks.*.mlp.fc1, blocks.*.mlp.fc2")
    assert fine.num_blocks == 6
    assert [len(unit.parameters) for unit in fine.blocks[:3]] == [6, 4, 2]


@pytest.mark.parametrize(
    ("units", "says"),
    [
        ("blocks.*.ffn", "model.units = 'blocks.*.ffn' matches no module"),
        ("norm", "matches norm, outside of the blocks"),
        ("blocks.0.attn", r"matches nothing in blocks\.1"),
        ("blocks.*.mlp, blocks.*.mlp.fc1", "inside it"),
        (" , ", "names nothing"),
    ],
)
def test_units_that_do_not_fit_are_refused(units: str, says: str) -> None:
    entry, _ = MODELS["shipped"]
    with pytest.raises(LayerMapError, match=says):
        split(entry, entry.build(), units)


def test_a_block_without_attention_is_refused() -> None:
    entry = ZOO["timm/mixer"]
    with pytest.raises(LayerMapError, match=r"attention-mlp', but blocks\.0 has no attention"):
        split(entry, entry.build())


def test_budgets_in_parameters_choose_between_an_attention_and_an_mlp() -> None:
    config = load_config(None, ["model.units=attention-mlp", "budget.unit=parameters"])
    layers = workbench(config.to_flat()).resident.layers
    whole = workbench(load_config(None, []).to_flat()).resident.layers
    assert layers.num_blocks == 2 * whole.num_blocks
    attention, mlp = layers.blocks[:2]
    assert attention.elements < mlp.elements
    with pytest.raises(ConfigError, match=r"model\.units = 'blocks\.\*\.fnn'"):
        workbench(load_config(None, ["model.units=blocks.*.fnn"]).to_flat())
