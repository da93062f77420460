"""FLOPs are counted whichever way torch takes through a layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerfed.layers import LayerMap
from layerfed.task.base import Batch
from layerfed.task.flops import counter, forward_flops
from tests.conftest import WIDTH

BATCH, TOKENS, WIDE = 3, 5, 16


def forward_count(layer: nn.Module, *inputs: Tensor) -> float:
    with counter() as flops:
        layer(*inputs)
    return float(flops.get_total_flops())


@pytest.mark.parametrize("kind", ["attention", "encoder layer"])
def test_a_frozen_layer_counts_what_a_trained_one_does(kind: str) -> None:
    """Frozen, in evaluation mode, both become one fused operation."""
    tokens = torch.randn(BATCH, TOKENS, WIDE)
    layer: nn.Module
    if kind == "attention":
        layer, inputs = nn.MultiheadAttention(WIDE, 4, batch_first=True), (tokens,) * 3
    else:
        layer, inputs = nn.TransformerEncoderLayer(WIDE, 4, 24, batch_first=True), (tokens,)
    layer.eval()
    trained = forward_count(layer, *inputs)
    frozen = forward_count(layer.requires_grad_(False), *inputs)
    assert frozen == trained > 2 * BATCH * TOKENS * 4 * WIDE**2


def test_a_forward_pass_is_counted_by_layer(tiny: nn.Module, layers: LayerMap) -> None:
    example: Batch = {"x": torch.randn(1, 5)}
    by_layer, whole = forward_flops(tiny, layers, example, lambda model, batch: model(batch["x"]))
    assert by_layer.keys() == set(layers.names)
    assert by_layer["blocks.0"] == by_layer["blocks.3"] == 2 * WIDTH**2
    assert by_layer["embeddings"] == 2 * 5 * WIDTH
    assert sum(by_layer.values()) == whole
