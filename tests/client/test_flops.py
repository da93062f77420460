"""FLOPs are counted on every path that torch takes through a layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerfed.client.flops import TotalFlops, _counter, forward_flops
from layerfed.models.layers import LayerMap
from layerfed.task.base import Batch
from tests.conftest import WIDTH

BATCH, TOKENS, WIDE = 3, 5, 16


def forward_count(layer: nn.Module, *inputs: Tensor) -> float:
    with TotalFlops() as flops:
        layer(*inputs)
    return flops.total


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


def test_attention_on_a_cpu_is_counted_there_and_back() -> None:
    """Two products forward; five backward, since the scores are computed once more."""
    query, key, value = (torch.randn(2, 4, TOKENS, 8, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 4 * TOKENS * TOKENS * 8
    with TotalFlops() as flops:
        out = nn.functional.scaled_dot_product_attention(query, key, value)
    assert flops.total == 2 * product
    with TotalFlops() as flops:
        out.sum().backward()
    assert flops.total == 5 * product


def test_the_total_is_that_of_torchs_counter(tiny: nn.Module) -> None:
    """Forward and backward, of composed operations too."""
    net = nn.Sequential(
        nn.Conv1d(2, 4, 3),
        nn.Flatten(),
        nn.Linear(12, 16),
        nn.Unflatten(1, (2, 8)),
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        nn.LSTM(8, 5, batch_first=True),
    )

    def step() -> None:
        out, _ = net(torch.randn(3, 2, 5))
        torch.einsum("bti,btj->bij", out, out).sum().backward()

    with TotalFlops() as ours:
        step()
    with _counter() as theirs:
        step()
    assert ours.total == theirs.get_total_flops() > 10_000


def test_a_forward_pass_is_counted_by_layer(tiny: nn.Module, layers: LayerMap) -> None:
    example: Batch = {"x": torch.randn(1, 5)}
    by_layer, whole = forward_flops(tiny, layers, example, lambda model, batch: model(batch["x"]))
    assert by_layer.keys() == set(layers.names)
    assert by_layer["blocks.0"] == by_layer["blocks.3"] == 2 * WIDTH**2
    assert by_layer["embeddings"] == 2 * 5 * WIDTH
    assert sum(by_layer.values()) == whole
