"""Each aggregation against its formula, written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerfed.models.layers import LayerMap
from layerfed.server import aggregation
from layerfed.server.aggregation import (
    AGGREGATIONS,
    Aggregation,
    Aggregator,
    MaskedMean,
    TrimmedMean,
)
from layerfed.server.optimizers import SERVER_OPTIMIZERS
from layerfed.server.steps import CappedWeights, ServerStep
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
                    if tensor.endswith("running_var"):
                        expected = np.maximum(expected, 0)
                    np.testing.assert_allclose(updated[tensor], expected, rtol=1e-6, atol=1e-9)
                assert updated[tensor].dtype == theta[tensor].dtype


def moved(mean: Aggregator, layer: str, theta: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
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


# ------------------------------------------------------------------------------ median, trimmed mean
def trimmed(values: np.ndarray, cut: int) -> np.ndarray:
    """The mean of each column, without its `cut` smallest and largest, one element after the other."""
    columns = values.reshape(len(values), -1).astype(np.float64)
    means = []
    for column in columns.T:
        kept = list(column)
        for _ in range(cut):
            kept.remove(min(kept))
            kept.remove(max(kept))
        means.append(sum(kept) / len(kept))
    return np.array(means).reshape(values.shape[1:])


@settings(deadline=None, max_examples=40)
@given(
    rounds(), st.sampled_from([0.0, 0.1, 0.2, 0.25, 1 / 3, 0.4, 0.49]), st.sampled_from([5, 2**18])
)
def test_robust_rules_are_their_formulas_over_the_clients_of_each_layer(
    case: tuple[list[list[bool]], list[int], int], trim: float, table: int
) -> None:
    """Also where a layer's elements are combined in many pieces."""
    masks, examples, seed = case
    deltas = [tensors(seed + 1 + i, 1e-2) for i in range(len(masks))]
    names = [block.name for block in LAYERS.blocks]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregation, "TABLE", table)
        for rule in ("median", "trimmed-mean"):
            found = Aggregation(rule, trim).begin(LAYERS)
            for mask, delta, d in zip(masks, deltas, examples, strict=True):
                trained = [name for name, on in zip(names, mask, strict=True) if on] + ["head"]
                norms = found.add(trained, delta, d)
                for layer in trained:
                    rows = [delta[p].ravel().astype(float) for p in LAYERS[layer].parameters]
                    assert norms[layer] == pytest.approx(np.square(np.concatenate(rows)).sum())
            for index, name in enumerate([*names, "head"]):
                there = [i for i, mask in enumerate(masks) if [*mask, True][index]]
                assert (name in found.weights) == bool(there)
                if not there:
                    continue
                assert found.weights[name] == sum(examples[i] for i in there)
                assert found.norm_sq(name) is None
                cut = int(np.floor(trim * len(there) + 1e-9))
                changes = [change.copy() for change in found.changes(name)]
                result = found.pop(name)
                for tensor in LAYERS[name].tensors:
                    stacked = np.stack([deltas[i][tensor] for i in there])
                    expected = (
                        np.median(stacked.astype(float), axis=0)
                        if rule == "median"
                        else trimmed(stacked, cut)
                    )
                    assert result[tensor].dtype == np.float64
                    np.testing.assert_allclose(result[tensor], expected, rtol=1e-12, atol=1e-15)
                for parameter, change in zip(LAYERS[name].parameters, changes, strict=True):
                    np.testing.assert_array_equal(change, result[parameter])


@pytest.mark.parametrize(
    ("trim", "clients", "cut"),
    [
        *[(0.1, 9, 0), (0.1, 10, 1), (0.1, 1, 0), (0.3, 10, 3), (0.29, 100, 29), (0.25, 4, 1)],
        *[(0.0, 100, 0), (0.49, 2, 0), (0.49, 3, 1), (0.4999999999, 10, 4), (1 / 3, 3, 1)],
    ],
)
def test_the_trimmed_mean_leaves_out_its_share_and_never_everyone(
    trim: float, clients: int, cut: int
) -> None:
    assert TrimmedMean(LAYERS, Aggregation(trim=trim)).cut(clients) == cut


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_robust_rules_do_not_depend_on_the_order_of_replies(rule: str) -> None:
    deltas = [tensors(i, 10.0**-i) for i in range(8)]
    results = []
    for order in (range(8), reversed(range(8)), [3, 1, 4, 0, 5, 7, 2, 6]):
        found = Aggregation(rule, 0.25).begin(LAYERS)
        for i in order:
            found.add(["head"], deltas[i], 17 + i)
        results.append(found.pop("head"))
    for other in results[1:]:
        for name, values in results[0].items():
            np.testing.assert_array_equal(values, other[name])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_minority_stays_between_what_the_others_say(data: st.DataObject) -> None:
    """Yin et al. (2018): for any values and weights that fewer than half of the clients send."""
    honest = data.draw(st.integers(2, 6))
    hostile = data.draw(st.integers(1, honest - 1))
    rules = [("median", 0.0), ("trimmed-mean", hostile / (honest + hostile))]
    scale = data.draw(st.sampled_from([1e-6, 1.0, 1e6, 1e15]))
    updates = [tensors(i) for i in range(honest)]
    forged = [tensors(100 + i, scale) for i in range(hostile)]
    for rule, trim in rules:
        found = Aggregation(rule, trim).begin(LAYERS)
        for update in updates:
            found.add(["head"], update, 10)
        for update in forged:
            found.add(["head"], update, 2**29)
        for name, values in found.pop("head").items():
            said = np.stack([update[name] for update in updates])
            assert (values >= said.min(axis=0)).all()
            assert (values <= said.max(axis=0)).all()


@pytest.mark.parametrize("rule", AGGREGATIONS)
def test_a_layer_of_one_client_is_what_that_client_says(rule: str) -> None:
    found = Aggregation(rule, 0.4).begin(LAYERS)
    update = tensors(1)
    found.add(["blocks.2"], update, 7)
    for name, values in found.pop("blocks.2").items():
        np.testing.assert_allclose(values, update[name], rtol=1e-15)


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_updates_are_kept_as_they_came_and_freed_layer_by_layer(rule: str) -> None:
    found = Aggregation(rule).begin(LAYERS)
    assert isinstance(found, TrimmedMean)
    for i in range(3):
        found.add(["blocks.0", "head"], tensors(i), 1)
    kept = [update for updates in found._updates.values() for update in updates]
    assert all(update.dtype in (np.float32, np.int64) for update in kept)
    found.pop("blocks.0")
    assert set(found._updates) == set(LAYERS.head.tensors)


def test_a_forged_count_counts_as_much_as_is_allowed() -> None:
    assert CappedWeights(50).weigh(2**29) == 50
    assert CappedWeights(50).weigh(49) == 49
    assert ServerStep().weigh(2**29) == 2**29
