"""E1 and E2 against their definitions, and the known errors of the estimates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerfed.server.theory import (
    UpdateSpread,
    importance_term,
    mask_divergence,
    predicted_floor,
)

counts = st.lists(st.integers(1, 500), min_size=1, max_size=8)


def norm_sq(x: np.ndarray) -> float:
    return float(x.ravel() @ x.ravel())


@given(counts, st.data())
def test_the_divergence_of_a_mask_is_chi_squared(examples: list[int], data: st.DataObject) -> None:
    """Σ_i (w_i − α_i)² / α_i, written out."""
    there = data.draw(st.sets(st.integers(0, len(examples) - 1), min_size=1))
    total, trained = sum(examples), sum(examples[i] for i in there)
    chi = 0.0
    for i, d in enumerate(examples):
        alpha, weight = d / total, d / trained if i in there else 0.0
        chi += (weight - alpha) ** 2 / alpha
    assert mask_divergence(trained, total) == pytest.approx(chi, abs=1e-9)


def test_a_layer_that_everyone_trains_has_no_divergence() -> None:
    assert mask_divergence(12, 12) == 0.0


@given(st.integers(0, 1000), counts)
def test_importance_is_never_below_the_untrained_layers_gradient(
    seed: int, examples: list[int]
) -> None:
    """Jensen: a mean of squared norms is at least the squared norm of the mean."""
    rng = np.random.default_rng(seed)
    gradients = rng.standard_normal((len(examples), 3, 5))  # clients, layers, elements
    moved = np.array([True, False, False])
    d = np.array(examples)
    mean = np.einsum("i,ile->le", d / d.sum(), gradients)
    truth = norm_sq(mean[1]) + norm_sq(mean[2])
    estimate = importance_term((gradients**2).sum(axis=2), d, moved)
    assert estimate >= truth * (1 - 1e-12)
    same = np.broadcast_to(gradients[:1], gradients.shape)
    exact = norm_sq(same[0, 1]) + norm_sq(same[0, 2])
    assert importance_term((same**2).sum(axis=2), d, moved) == pytest.approx(exact)


def test_nothing_is_lost_where_every_layer_moves() -> None:
    assert importance_term(np.ones((2, 3)), np.array([1, 2]), np.ones(3, dtype=bool)) == 0.0


@given(st.integers(0, 1000), counts, st.integers(1, 9), st.sampled_from([0.01, 0.5]))
def test_heterogeneity_of_plain_sgd_is_the_spread_of_the_clients_gradients(
    seed: int, examples: list[int], steps: int, lr: float
) -> None:
    """One layer that the first clients train; Δ_i = −η τ g_i, with g_i the same at each step."""
    rng = np.random.default_rng(seed)
    gradients = rng.standard_normal((len(examples), 6))
    updates = -lr * steps * gradients
    there = range((len(examples) + 1) // 2)
    weights = np.array([examples[i] for i in there]) / sum(examples[i] for i in there)
    mean_gradient = weights @ gradients[list(there)]
    kappa_sq = sum(w * norm_sq(gradients[i] - mean_gradient) for w, i in zip(weights, there))  # noqa: B905
    chi = sum(examples) / sum(examples[i] for i in there) - 1

    spread = UpdateSpread()
    for i in rng.permutation(len(examples)):
        norms = {"blocks.0": norm_sq(updates[i])} if i in there else {}
        spread.add(int(i), examples[i], {"blocks.0": steps}, norms)
    mean_update = weights @ updates[list(there)]
    found = spread.heterogeneity_term({"blocks.0": norm_sq(mean_update)}, lr)
    assert found == pytest.approx(chi * kappa_sq, rel=1e-6, abs=1e-9)


def test_over_all_clients_a_sample_of_them_diverges_too() -> None:
    """Two of eight clients, all of them alike in size: χ = 8/2 − 1, though both train the layer."""
    spread = UpdateSpread()
    for client, norm in enumerate((1.0, 3.0)):
        spread.add(client, 10, {"a": 2.0}, {"a": norm})
    assert spread.heterogeneity_term({"a": 1.5}, 0.5) == 0.0
    assert spread.heterogeneity_term({"a": 1.5}, 0.5, total=80) == pytest.approx(3 * 0.5 / 1.0)


def test_the_figure_does_not_depend_on_who_answered_first() -> None:
    found = set()
    for order in ([0, 1, 2], [2, 0, 1]):
        spread = UpdateSpread()
        for client in order:
            spread.add(client, client + 3, {"a": 5.0}, {"a": 0.1 + client / 7} if client else {})
        found.add(spread.heterogeneity_term({"a": 0.1}, 0.1))
    assert len(found) == 1


def test_a_client_that_does_not_say_its_steps_leaves_it_unknown() -> None:
    spread = UpdateSpread()
    spread.add(0, 3, {"a": 5.0}, {"a": 1.0})
    assert spread.heterogeneity_term({"a": 1.0}, 0.1) == 0.0
    spread.add(1, 3, None, {"a": 1.0})
    assert spread.heterogeneity_term({"a": 1.0}, 0.1) is None


def test_rounding_gives_no_negative_term() -> None:
    spread = UpdateSpread()
    spread.add(0, 1, {"a": 1.0}, {"a": 1.0})
    spread.add(1, 1, {"a": 1.0}, {})
    assert spread.heterogeneity_term({"a": 1.0 + 1e-12}, 1.0) == 0.0


def test_disagreement_is_the_share_of_updates_that_the_mean_loses() -> None:
    rng = np.random.default_rng(0)
    updates, examples = rng.standard_normal((3, 5)), np.array([1, 2, 3])
    mean = examples @ updates / 6
    spread = UpdateSpread()
    for client, (update, count) in enumerate(zip(updates, examples, strict=True)):
        alone = {"alone": 4.0} if client == 0 else {}
        spread.add(client, int(count), None, {"all": norm_sq(update), **alone})
    own = examples @ [norm_sq(update) for update in updates] / 6
    found = spread.disagreement({"all": norm_sq(mean), "alone": 4.0, "recycled": 1.0})
    assert found == pytest.approx(1 - norm_sq(mean) / own)
    assert UpdateSpread().disagreement({"all": 1.0}) is None


@given(st.integers(0, 1000), counts)
def test_the_predicted_floor_has_the_two_terms(seed: int, examples: list[int]) -> None:
    rng = np.random.default_rng(seed)
    gradients = rng.standard_normal((len(examples), 4, 5))
    norms, d = (gradients**2).sum(axis=2), np.array(examples, dtype=float)
    masks = rng.random((len(examples), 4)) < 0.5
    able = masks | (rng.random(masks.shape) < 0.7)
    expected = 0.0
    for layer in range(4):
        own = able[:, layer]
        if not own.any():
            continue
        shares = d[own] / d[own].sum()
        size, trains = float(shares @ norms[own, layer]), masks[own, layer]
        if trains.any():
            weights = trains * shares / (trains @ shares)
            size *= 0.3 * float(((weights - shares) ** 2 / shares).sum())
        expected += size
    assert predicted_floor(norms, d, masks, 0.3, able) == pytest.approx(expected)
    moved, everyone = masks.any(axis=0), np.ones_like(masks)
    assert predicted_floor(norms, d, masks, 0.0, everyone) == pytest.approx(
        importance_term(norms, d, moved)
    )
