"""The streaming mean against formula (7), written out."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from layerfed.aggregation import MaskedMean
from layerfed.layers import LayerMap
from layerfed.server_optimizers import SERVER_OPTIMIZERS
from tests.conftest import BLOCKS, TinyNet

LAYERS = LayerMap.from_model(TinyNet())


def formula(
    theta: np.ndarray, deltas: list[np.ndarray], mask: list[bool], examples: list[int]
) -> np.ndarray:
    """θ_l + Σ_i w_{i,l} Δ_{i,l} with w_{i,l} = d_i m_i(l) / Σ_j d_j m_j(l), all of it in float64."""
    total = sum(d for d, m in zip(examples, mask, strict=True) if m)
    step = sum(
        d * m / total * delta.astype(np.float64)
        for delta, m, d in zip(deltas, mask, examples, strict=True)
    )
    return (theta.astype(np.float64) + step).astype(theta.dtype)


def tensors(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    state = TinyNet().state_dict()
    return {
        name: (scale * rng.standard_normal(tuple(t.shape))).astype(t.numpy().dtype)
        for name, t in state.items()
    }


@st.composite
def rounds(draw: st.DrawFn) -> tuple[list[list[bool]], list[int], int]:
    n = draw(st.integers(1, 6))
    masks = draw(
        st.lists(st.lists(st.booleans(), min_size=BLOCKS, max_size=BLOCKS), min_size=n, max_size=n)
    )
    examples = draw(st.lists(st.integers(1, 10_000), min_size=n, max_size=n))
    return masks, examples, draw(st.integers(0, 2**16))


@settings(deadline=None, max_examples=40)
@given(rounds())
def test_the_streaming_mean_is_formula_7(case: tuple[list[list[bool]], list[int], int]) -> None:
    masks, examples, seed = case
    theta = tensors(seed)
    deltas = [tensors(seed + 1 + i, 1e-2) for i in range(len(masks))]
    names = [block.name for block in LAYERS.blocks]

    mean = MaskedMean(LAYERS)
    for mask, delta, d in zip(masks, deltas, examples, strict=True):
        trained = [name for name, on in zip(names, mask, strict=True) if on] + ["head"]
        mean.add(trained, delta, d)

    for index, name in enumerate(names):
        chosen = [mask[index] for mask in masks]
        assert (name in mean.weights) == any(chosen)
        if any(chosen):
            layer = {t: theta[t] for t in LAYERS[name].tensors}
            updated = moved(mean, name, layer)
            for tensor in LAYERS[name].tensors:
                if theta[tensor].dtype == np.float32:
                    expected = formula(theta[tensor], [d[tensor] for d in deltas], chosen, examples)
                    np.testing.assert_allclose(updated[tensor], expected, rtol=1e-6, atol=1e-9)
                assert updated[tensor].dtype == theta[tensor].dtype


def moved(mean: MaskedMean, layer: str, theta: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """θ^{t+1}_l as the paper's plain average gives it."""
    return SERVER_OPTIMIZERS["sgd"]().step(LAYERS[layer], theta, mean.pop(layer))


def test_the_order_of_replies_changes_no_more_than_the_last_bit() -> None:
    deltas = [tensors(i, 10.0**-i) for i in range(8)]
    theta = {t: v for t, v in tensors(99).items() if t in LAYERS["head"].tensors}
    results = []
    for order in (range(8), reversed(range(8)), [3, 1, 4, 0, 5, 7, 2, 6]):
        mean = MaskedMean(LAYERS)
        for i in order:
            mean.add(["head"], deltas[i], 17 + i)
        results.append(moved(mean, "head", theta))
    for other in results[1:]:
        for name in theta:
            np.testing.assert_array_max_ulp(results[0][name], other[name], maxulp=1)


def test_layers_only_the_second_client_trained_are_aggregated_too() -> None:
    """Defect 4 of the released code: only what the *first* client trained was aggregated."""
    mean = MaskedMean(LAYERS)
    mean.add(["blocks.0", "head"], tensors(1), 10)
    mean.add(["blocks.3", "head"], tensors(2), 10)
    assert mean.weights == {"blocks.0": 10, "head": 20, "blocks.3": 10}
    layer = {t: np.zeros_like(v) for t, v in tensors(2).items() if t in LAYERS["blocks.3"].tensors}
    updated = moved(mean, "blocks.3", layer)
    np.testing.assert_allclose(
        updated["blocks.3.linear.weight"], tensors(2)["blocks.3.linear.weight"]
    )


def test_integer_buffers_get_the_rounded_mean() -> None:
    mean = MaskedMean(LAYERS)
    name = "blocks.0.norm.num_batches_tracked"
    for count in (4, 5, 5):
        update = tensors(1)
        update[name] = np.asarray(count, dtype=np.int64)
        mean.add(["blocks.0"], update, 1)
    layer = {t: v for t, v in tensors(0).items() if t in LAYERS["blocks.0"].tensors}
    layer[name] = np.asarray(10, dtype=np.int64)
    assert moved(mean, "blocks.0", layer)[name] == 15
