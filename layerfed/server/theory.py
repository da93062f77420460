"""Estimate the two terms of the error floor in every round [S, Lemma 4.6, Theorem 4.7].

Training a few layers stalls at an error floor driven by E1 + E2:

E1 = Σ_{l∉L_t} ‖∇_l f(θ^t)‖²
    The loss from layers that no client trains in round t; L_t are the layers that some client trains.
E2 = Σ_{l∈L_t} χ_l κ_l²,   χ_l = Σ_i (w_{i,l} − α_i)² / α_i,   κ_l² ≥ Σ_i α_i ‖∇_l f_i − ∇_l f‖²
    The loss from averaging layer l over the clients that train it, with weights w_{i,l} in place of the
    data's α_i. χ_l is the distance between the two, and κ_l² is the difference between clients'
    gradients. The α_i are those of all clients, so a cohort of 20 of 100 has χ_l ≈ 4 with any masks. The
    part of E2 that comes from masks, with α_i among the cohort, is estimated as well.

More layers for everyone lower both terms. Masks that agree lower E2, and masks that differ lower E1. The
paper's constants could not be recovered, so the two terms are shown side by side and not added. Both are
in the unit of squared gradients. They are estimates, and each function states its bias.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["UpdateSpread", "importance_term", "mask_divergence", "predicted_floor"]


def importance_term(grad_norm_sq: np.ndarray, examples: np.ndarray, moved: np.ndarray) -> float:
    """Estimate E1 from the probe: Σ_{l∉L_t} Σ_i α_i ‖g_{i,l}‖².

    Parameters
    ----------
    grad_norm_sq : numpy.ndarray
        ‖g_{i,l}‖² at θ^t, shape (n, L).
    examples : numpy.ndarray
        d_i, shape (n,); α_i is a client's share of their sum.
    moved : numpy.ndarray
        Booleans, shape (L,): l ∈ L_t.

    Notes
    -----
    The estimate is biased upwards. A mean of squared norms exceeds the squared norm of the mean gradient
    by the spread among clients and by the noise of their probe batches, so it is positive even if ∇f is
    zero. More probe batches do not lower it, since the norm is taken of each batch separately. It uses
    only the clients that answered the probe, with α_i relative to them.
    """
    shares = examples / examples.sum()
    return float((shares @ grad_norm_sq)[~moved].sum())


def mask_divergence(trained: Any, total: float) -> Any:
    """Return χ_l of a layer: 1/p − 1, with p the share of the data whose clients train it.

    Parameters
    ----------
    trained, total : float
        Σ d_i over the clients that train the layer, and over all clients.

    Notes
    -----
    With w_{i,l} = α_i/p for clients that train the layer and 0 for the others, Σ_i (w_{i,l} − α_i)²/α_i
    is p (1/p − 1)² + (1 − p) = 1/p − 1. It is 0 if every client trains the layer.
    """
    return total / trained - 1.0


def predicted_floor(
    grad_norm_sq: np.ndarray,
    examples: np.ndarray,
    masks: np.ndarray,
    disagreement: float,
    able: np.ndarray,
) -> float:
    """Predict E1 + E2 of masks before training, with E2's part that masks cause.

    E1 is that of `importance_term`. For E2, χ_l follows from the masks, with α_i among the clients that
    could train layer l, and κ_l² is the share `disagreement` of Σ_i α_i ‖g_{i,l}‖², which is its upper
    bound. No mask gives a layer to the other clients: were they counted, a layer that few can afford
    would seem better off untrained.

    Parameters
    ----------
    grad_norm_sq : numpy.ndarray
        ‖g_{i,l}‖² at θ^t, shape (n, L).
    examples : numpy.ndarray
        d_i, shape (n,).
    masks : numpy.ndarray
        Booleans, shape (n, L).
    disagreement : float
        In [0, 1]; see `UpdateSpread.disagreement`.
    able : numpy.ndarray
        Booleans, shape (n, L): whether a client affords the layer. Those that train it do.
    """
    counts = examples[:, None] * (able | masks)
    shares = counts / np.maximum(counts.sum(axis=0), 1)
    trained, norms = (shares * masks).sum(axis=0), (shares * grad_norm_sq).sum(axis=0)
    moved = np.asarray(masks.any(axis=0))
    chi = mask_divergence(trained[moved], 1.0)
    return float(norms[~moved].sum() + disagreement * (chi * norms[moved]).sum())


class UpdateSpread:
    """An estimate of E2 from updates as they arrive, which keeps one number a client and layer.

    κ_l² is estimated by the weighted variance of the updates in units of η τ, the learning rate times
    the number of local steps: with plain SGD, Δ_i = −η Σ_s g_i(s), so Δ_i/(η τ) is client i's mean
    gradient along its way:

        κ_l² ≈ (Σ_i w_{i,l} ‖Δ_{i,l}‖² − ‖Σ_i w_{i,l} Δ_{i,l}‖²) / (η τ)²

    with τ the steps in which layer l moved.

    Notes
    -----
    The estimate uses only the clients that trained layer l. A layer of one client counts as 0, although
    its χ_l is largest. The spread includes the noise of minibatches (÷ τ), the drift of clients over τ
    steps, and the error of codecs. Under momentum or AdamW an update is no multiple of a mean gradient,
    so E2 can only be compared between strategies with the same settings. If numbers of steps differ, τ
    is their mean over the layer's clients, weighted like their updates.
    """

    def __init__(self) -> None:
        self._examples: dict[int, int] = {}
        self._steps: dict[int, Mapping[str, float] | None] = {}
        self._norms: dict[int, Mapping[str, float]] = {}

    def add(
        self,
        client: int,
        examples: int,
        steps: Mapping[str, float] | None,
        norms_sq: Mapping[str, float],
    ) -> None:
        """Add one client's update.

        Parameters
        ----------
        client : int
        examples : int
            d_i.
        steps : Mapping[str, float] | None
            The number of steps in which each layer moved. None if the client does not state it; E2 is
            then unknown.
        norms_sq : Mapping[str, float]
            ‖Δ_{i,l}‖² over the parameters of each layer that the client trained.
        """
        self._examples[client], self._steps[client] = examples, steps
        self._norms[client] = norms_sq

    def median_norm(self) -> float | None:
        """Return the median over clients of ‖Δ_i‖ over all trained layers, or None if unknown."""
        norms = [math.sqrt(sum(own.values())) for own in self._norms.values() if own]
        return statistics.median(norms) if norms else None

    def disagreement(self, mean_norms_sq: Mapping[str, float]) -> float | None:
        """Return the share of clients' squared updates that their mean loses, in [0, 1].

        It is Σ_l (Σ_i w_{i,l} ‖Δ_{i,l}‖² − ‖Σ_i w_{i,l} Δ_{i,l}‖²) / Σ_l Σ_i w_{i,l} ‖Δ_{i,l}‖² over the
        layers that several clients sent, among them the head. 0 means equal updates; noise of
        minibatches counts as disagreement. None if no layer has several updates.

        Parameters
        ----------
        mean_norms_sq : Mapping[str, float]
            ‖Σ_i w_{i,l} Δ_{i,l}‖² of each layer.
        """
        single, together = 0.0, 0.0
        for layer, mean_norm_sq in mean_norms_sq.items():
            there = [client for client, norms in sorted(self._norms.items()) if layer in norms]
            if len(there) > 1:
                weights = np.array([self._examples[client] for client in there], dtype=np.float64)
                norms = [self._norms[client][layer] for client in there]
                single += float(weights @ norms / weights.sum())
                together += mean_norm_sq
        return min(max(1.0 - together / single, 0.0), 1.0) if single > 0 else None

    def heterogeneity_term(
        self, mean_norms_sq: Mapping[str, float], lr: float, total: float | None = None
    ) -> float | None:
        """Return E2 over the layers L_t, or None if a client did not state its steps.

        Parameters
        ----------
        mean_norms_sq : Mapping[str, float]
            ‖Σ_i w_{i,l} Δ_{i,l}‖² of each layer of L_t.
        lr : float
            η.
        total : float, optional
            Σ d_i over all clients, which gives the paper's E2. The default is Σ d_i over the cohort,
            which gives the part of E2 that comes from masks. The rest comes from sampling, and exists
            with full fine-tuning too.
        """
        # The sum is in the order of partition ids, so that it does not depend on the order of replies.
        clients: Sequence[int] = sorted(self._norms)
        steps = {client: found for client in clients if (found := self._steps[client]) is not None}
        if not clients or len(steps) < len(clients):
            return None
        if total is None:
            total = sum(self._examples[client] for client in clients)
        term = 0.0
        for layer, mean_norm_sq in mean_norms_sq.items():
            there = [client for client in clients if layer in self._norms[client]]
            if not there:
                continue  # no client sent it: an earlier update was used again
            examples = np.array([self._examples[client] for client in there], dtype=np.float64)
            weights = examples / examples.sum()
            norms = [self._norms[client][layer] for client in there]
            # Rounding may make the difference negative.
            spread = max(float(weights @ norms) - mean_norm_sq, 0.0)
            mean_steps = float(weights @ [steps[client][layer] for client in there])
            chi = mask_divergence(examples.sum(), total)
            term += chi * spread / (lr * mean_steps) ** 2
        return float(term)
