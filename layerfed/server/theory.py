"""The two terms that hold training back, estimated in every round [S, Lemma 4.6, Theorem 4.7].

Training a few layers stalls at an error floor driven by E1 + E2:

E1 = Σ_{l∉L_t} ‖∇_l f(θ^t)‖²
    What is lost on the layers that nobody trains in round t, with L_t the layers that somebody does.
E2 = Σ_{l∈L_t} χ_l κ_l²,   χ_l = Σ_i (w_{i,l} − α_i)² / α_i,   κ_l² ≥ Σ_i α_i ‖∇_l f_i − ∇_l f‖²
    What is lost since layer l is averaged over the clients that train it, with weights w_{i,l} in place
    of the data's α_i: χ_l says how far the two are apart, κ_l² how much clients' gradients differ. The
    α_i are those of all clients, so that a round of 20 of 100 has χ_l ≈ 4 whatever their masks are. The
    part of it that masks are to blame for, with α_i among the round's clients, is given beside it.

More layers for everyone lower both; choices that agree lower E2, choices that differ lower E1. The
paper's constants could not be recovered, so the two are shown side by side and not added up. Both are
in the unit of squared gradients. They are estimates; how far they can be trusted is said at each
function.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["UpdateSpread", "importance_term", "mask_divergence"]


def importance_term(grad_norm_sq: np.ndarray, examples: np.ndarray, moved: np.ndarray) -> float:
    """Estimate E1 from the probe: Σ_{l∉L_t} Σ_i α_i ‖g_{i,l}‖².

    Parameters
    ----------
    grad_norm_sq : numpy.ndarray
        ‖g_{i,l}‖² at θ^t, shape (n, L).
    examples : numpy.ndarray
        d_i, shape (n,); α_i is each one's share of their sum.
    moved : numpy.ndarray
        Booleans, shape (L,): l ∈ L_t.

    Notes
    -----
    An estimate from above: a mean of squared norms exceeds the squared norm of the mean
    gradient by the spread among clients and by the noise of their probe batches, so it stays positive
    where ∇f is zero. More probe batches do not lower it, since each batch's norm is taken by itself.
    And it sees the round's clients that answered the probe only, with α_i relative to them.
    """
    shares = examples / examples.sum()
    return float((shares @ grad_norm_sq)[~moved].sum())


def mask_divergence(trained: float, total: float) -> float:
    """Return χ_l of a layer: 1/p − 1, with p the share of the data whose clients train it.

    Parameters
    ----------
    trained, total : float
        Σ d_i over the clients that train the layer, and over all clients that there are.

    Notes
    -----
    Put w_{i,l} = α_i/p for clients that train the layer, and 0 for the others, into Σ_i
    (w_{i,l} − α_i)²/α_i: p (1/p − 1)² + (1 − p) = 1/p − 1. It is 0 where everyone trains the layer.
    """
    return total / trained - 1.0


class UpdateSpread:
    """Estimates E2 from the updates, as they are folded in: a number a client and layer is kept.

    κ_l² is estimated by the weighted variance of the updates in units of η τ, the learning rate times
    the number of local steps: with plain SGD, Δ_i = −η Σ_s g_i(s), so Δ_i/(η τ) is client i's mean
    gradient along its way:

        κ_l² ≈ (Σ_i w_{i,l} ‖Δ_{i,l}‖² − ‖Σ_i w_{i,l} Δ_{i,l}‖²) / (η τ)²

    with τ the steps in which layer l moved.

    Notes
    -----
    Whom it sees: the clients that trained layer l, hence nothing of those that did not; a
    layer of one client counts as 0, although χ_l is largest there. The noise of minibatches is part of
    the spread (÷ τ), clients drift apart over τ steps, and codecs add their error. Under momentum or
    AdamW an update is no multiple of a mean gradient, and E2 can be compared between strategies of the
    same settings only. τ is the mean over the layer's clients, weighted like their updates, where
    numbers of steps differ.
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
        """Take in one client's update.

        Parameters
        ----------
        client : int
        examples : int
            d_i.
        steps : Mapping[str, float] | None
            In how many steps each layer moved; None where the client does not say, which makes E2
            unknown.
        norms_sq : Mapping[str, float]
            ‖Δ_{i,l}‖² over the parameters of each layer it trained.
        """
        self._examples[client], self._steps[client] = examples, steps
        self._norms[client] = norms_sq

    def median_norm(self) -> float | None:
        """Return the median over clients of ‖Δ_i‖, over all layers each trained; None if unknown."""
        norms = [math.sqrt(sum(own.values())) for own in self._norms.values() if own]
        return statistics.median(norms) if norms else None

    def heterogeneity_term(
        self, mean_norms_sq: Mapping[str, float], lr: float, total: float | None = None
    ) -> float | None:
        """Return E2 over some layers, L_t; None where a client did not say its steps.

        Parameters
        ----------
        mean_norms_sq : Mapping[str, float]
            ‖Σ_i w_{i,l} Δ_{i,l}‖² of each layer of L_t.
        lr : float
            η.
        total : float, optional
            Σ d_i over all clients, of whom this round's are some: E2 as the paper has it. By default
            over this round's clients: the part of E2 that their masks are to blame for. The rest comes
            from sampling, and is there with full fine-tuning too.
        """
        # In the order of partition ids, so that the figure does not depend on who answered first.
        clients: Sequence[int] = sorted(self._norms)
        steps = {client: found for client in clients if (found := self._steps[client]) is not None}
        if not clients or len(steps) < len(clients):
            return None
        if total is None:
            total = sum(self._examples[client] for client in clients)
        term = 0.0
        for layer, mean_norm_sq in mean_norms_sq.items():
            there = [client for client in clients if layer in self._norms[client]]
            examples = np.array([self._examples[client] for client in there], dtype=np.float64)
            weights = examples / examples.sum()
            norms = [self._norms[client][layer] for client in there]
            spread = max(float(weights @ norms) - mean_norm_sq, 0.0)  # rounding may cross zero
            mean_steps = float(weights @ [steps[client][layer] for client in there])
            chi = mask_divergence(examples.sum(), total)
            term += chi * spread / (lr * mean_steps) ** 2
        return float(term)
