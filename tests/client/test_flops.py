"""FLOPs are counted on every path that torch takes through a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from layerfed.client import flops as module
from layerfed.client.flops import TotalFlops, _counter, arithmetic, forward_flops
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

    def by_parts(model: Any, batch: Batch) -> Tensor:
        x = model.embed(batch["x"])
        for block in model.blocks:
            x = block(x)
        return model.head(model.norm(x))  # type: ignore[no-any-return]

    # A decoder's task calls its parts, of which none is the whole model.
    assert forward_flops(tiny, layers, example, by_parts) == (by_layer, whole)


# --------------------------------------------------------------------------- families of operations
def there_and_back(run: Callable[[], Tensor]) -> tuple[float, float]:
    """FLOPs of forward, and of forward and backward together."""
    with TotalFlops() as flops:
        out = run()
        forward = flops.total
        out.sum().backward()
    return forward, flops.total


GRAD = {"requires_grad": True}


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_grouped_convolution_takes_three_times_its_forward(groups: int, transposed: bool) -> None:
    """The gradient of the weights used to count once a group too often."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer, image = kind(8, 16, 3, stride=2, groups=groups), torch.randn(2, 8, 9, 9, **GRAD)
    positions = 9 * 9 if transposed else 4 * 4
    assert there_and_back(lambda: layer(image)) == (
        forward := 2 * 2 * positions * 8 * 16 * 9 / groups,
        3 * forward,
    )


def test_a_step_of_depthwise_convolutions_takes_three_times_its_forward() -> None:
    """EfficientNet-B0 used to count 40 times its forward pass."""
    net, image = timm.create_model("efficientnet_b0"), torch.randn(2, 3, 32, 32, **GRAD)
    forward, step = there_and_back(lambda: net(image))
    assert step == 3 * forward > 0


@pytest.mark.parametrize(
    ("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)], ids=["lstm", "gru", "rnn"]
)
def test_recurrent_layers_count_each_matrix_at_each_token(kind: type[nn.LSTM], gates: int) -> None:
    layer, tokens = kind(8, 5, batch_first=True), torch.randn(3, 7, 8, **GRAD)
    forward, step = there_and_back(lambda: layer(tokens)[0])
    assert forward == 2 * 3 * 7 * gates * 5 * (8 + 5)
    assert step == pytest.approx(3 * forward, rel=0.06), "the first state needs no gradient"


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_experts_count_however_they_are_computed(experts: str, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig

    width, hidden, picked, tokens = 32, 64, 2, 16
    config = MixtralConfig(
        vocab_size=50,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
        num_experts_per_tok=picked,
    )
    model = AutoModelForCausalLM.from_config(config, experts_implementation=experts).to(dtype)
    ids = torch.zeros(2, tokens // 2, dtype=torch.long)
    forward, step = there_and_back(lambda: model(ids).logits)
    attention = 2 * tokens * (4 * width**2 + 2 * width * tokens // 2)
    mixed = 2 * tokens * (picked * 3 * width * hidden + 4 * width)
    rotary = 2 * (width // 8) * tokens  # a product of the positions and the frequencies
    assert forward == pytest.approx(attention + mixed + 2 * tokens * width * 50 + rotary, rel=1e-3)
    assert step == pytest.approx(3 * forward, rel=0.03), "attention's scores are computed again"


@pytest.mark.parametrize(
    ("first", "second"),
    [((8, 3), (4, 3, 5)), ((3, 8), (8, 5)), ((4, 2, 3), (4, 3, 5)), ((4, 2, 3), (3, 20))],
)
def test_grouped_products_are_products(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    """Four groups of two rows, two inner numbers, two rows each, or five columns."""
    rows, inner, columns = {2: (3, 8, 5)}.get(len(second), (8, 3, 5))
    if len(first) == 3 and len(second) == 2:
        rows, inner, columns = 2, 3, 20
    assert module._grouped_product(first, second) == 2 * rows * inner * columns


def test_products_with_vectors_and_in_place_count() -> None:
    a, b, c, v = torch.randn(2, 3), torch.randn(3, 4), torch.zeros(2, 4), torch.randn(3)
    for run, expected in (
        (lambda: a @ v, 12),
        (lambda: v @ v, 6),
        (lambda: torch.outer(v, v), 0),  # one multiplication an element, and no sum
        (lambda: c.addmm_(a, b), 48),
        (lambda: torch.addmv(torch.zeros(2), a, v), 12),
    ):
        with TotalFlops() as flops:
            run()
        assert flops.total == expected


def test_arithmetic_without_a_formula_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_NAMED", set())
    with caplog.at_level("WARNING", "flwr"):
        for _ in range(2):
            with TotalFlops() as flops:
                nn.Bilinear(3, 4, 5)(torch.randn(2, 3), torch.randn(2, 4))
    assert flops.total == 0
    assert [r.getMessage() for r in caplog.records] == [
        "FLOPs leave out aten._trilinear, for which there is no formula"
    ]


def test_what_is_arithmetic_goes_by_name() -> None:
    aten = torch.ops.aten
    for name in ("_fft_r2c", "_sparse_mm", "_cdist_forward", "linalg_inv_ex", "_linalg_svd"):
        assert arithmetic(getattr(aten, name)), name
    for name in (
        *("add", "gelu", "native_layer_norm", "_softmax", "cummax", "hamming_window", "embedding"),
        *("upsample_bilinear2d", "upsample_linear1d", "_thnn_fused_lstm_cell", "im2col", "relu"),
        *("native_batch_norm", "max_pool2d_with_indices", "nll_loss_forward", "celu", "elu"),
    ):
        assert not arithmetic(getattr(aten, name)), name
    assert arithmetic(torch.ops.mkldnn._convolution_pointwise)
