"""Combine the updates of a round into one update for each layer.

=============== ======================================================== ==========================
rule            update of layer l, over the k clients that trained it    memory, besides the model
=============== ======================================================== ==========================
`mean`          Σ_i w_{i,l} Δ_{i,l}, w_{i,l} = d_i / Σ_j d_j (eqs. 5-7)  one float64 sum
`median`        each element's median                                    every update of the round
`trimmed-mean`  each element's mean, without the ⌊β k⌋ smallest and the  every update of the round
                ⌊β k⌋ largest
`svd`           that of `mean`; adapters: the best ones of their rank    A and B of every client
                for Σ_i w_{i,l} B_i A_i
`stack`         that of `mean`; adapters: none, and α/r times that sum   the same, and a weight
                for the weight beside them
=============== ======================================================== ==========================

The mean is the paper's, and streams: each update is added to a sum and can be freed at once, and the
weights need not be known before the last reply. The order of replies changes the sum by 10⁻¹⁶ of its
size. In the float32 model that is at most the rounding of the last bit, and nothing in nearly every
element.

The other two rules are those of Yin et al. (2018). If fewer than half of a layer's clients lie (with
the trimmed mean, at most ⌊β k⌋), each element stays between values that honest clients sent. These
rules take no weights, since a client states its own weight: one with a large d_i would be a majority by
itself. Their result does not depend on the order of replies.

The mean of B times the mean of A is not the mean of the products B·A, which is what clients' models
add to a weight. `svd` computes that mean without forming it, from all factors side by side, and cuts it
to the adapters' rank, as FlexLoRA does [Bai et al., arXiv 2402.11505]. No other adapters of that rank
are closer. `stack` loses nothing, as FLoRA [Wang et al., arXiv 2409.05976]: all factors side by side are
one pair of factors. Its product is added to the frozen weight, and adapters begin again. The weight then
travels to clients. The factors side by side would be smaller only if Σ_i r_i is below half the weight's
side, and a node that missed rounds would need those of all of them.

Each rule averages over the clients that trained a layer, as the paper does. So a layer that one client
trained takes this client's whole step, however many others left the layer as it is. An average over the
*cohort* counts these as no change: the layer's update is multiplied by Σ_{i trained l} d_i / Σ_i d_i, or
by the share of the clients if the rule takes no weights. The model then moves along the mean of the
clients' masked updates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import ClassVar
from zlib import crc32

import numpy as np

from layerfed.config.seeding import Stream, generator
from layerfed.exchange.clipping import norm_of
from layerfed.exchange.pieces import pieces
from layerfed.models.factors import adapted_weight, factor_pairs
from layerfed.models.layers import LayerMap

__all__ = [
    "AGGREGATIONS",
    "WEIGHTED_MEAN",
    "Aggregation",
    "Aggregator",
    "MaskedMean",
    "Median",
    "Products",
    "TrimmedMean",
]

PIECE = 2**15
# Size of the table in which the clients' values of some elements are put side by side and sorted.
TABLE = 2**18
NOTHING: Mapping[str, np.ndarray] = MappingProxyType({})


@dataclass(frozen=True)
class Aggregation:
    """The rule that combines the updates of a round, with its parameter.

    Attributes
    ----------
    rule : {"mean", "median", "trimmed-mean", "svd", "stack"} (default: "mean")
    trim : float (default: 0.1)
        β of the trimmed mean, in [0, 0.5).
    scale : float (default: 1)
        α/r of adapters that are stacked.
    seed : int (default: 0)
        The run's seed, which draws the adapters that begin again.
    over : {"trained", "cohort"} (default: "trained")
        The clients that a layer's update is averaged over.
    """

    rule: str = "mean"
    trim: float = 0.1
    scale: float = 1.0
    seed: int = 0
    over: str = "trained"

    def begin(
        self, layers: LayerMap, model: Mapping[str, np.ndarray] = NOTHING, number: int = 0
    ) -> Aggregator:
        """Return the aggregator for the updates of round `number`, which begins with `model`."""
        return AGGREGATIONS[self.rule](layers, self, model, number)

    def share(self, mean: Aggregator, layer: str) -> float:
        """Return what a layer's update is multiplied by, in (0, 1]."""
        return mean.trained_share(layer) if self.over == "cohort" else 1.0


WEIGHTED_MEAN = Aggregation()
"""The paper's rule."""


@dataclass(eq=False)
class Aggregator(ABC):
    """A rule that combines a round's updates into one for each layer.

    Parameters
    ----------
    layers : LayerMap
        The split of the model into layers.
    how : Aggregation
        The rule's parameters.
    model : Mapping[str, numpy.ndarray]
        θ^t by tensor, for rules that read it.
    number : int
        t, from 1.
    """

    layers: LayerMap
    how: Aggregation = WEIGHTED_MEAN
    model: Mapping[str, np.ndarray] = field(default_factory=dict)
    number: int = 0
    weights: dict[str, int] = field(default_factory=dict, init=False)
    """Σ d_j over the clients that trained each layer, also for rules without weights."""
    _cohort: int = field(default=0, init=False)
    _trained: dict[str, int] = field(default_factory=dict, init=False)

    weighted: ClassVar[bool] = True
    """Whether clients count by their numbers of examples; else each counts once."""

    def add(
        self, trained: Iterable[str], update: Mapping[str, np.ndarray], examples: int
    ) -> dict[str, float]:
        """Add one client's update and return ‖Δ_{i,l}‖² of each layer, over its parameters.

        Parameters
        ----------
        trained : Iterable[str]
            Names of the layers this client trained, the head included.
        update : Mapping[str, numpy.ndarray]
            Δ_i of every tensor of those layers. The rule may keep the arrays, so they must not change.
        examples : int
            d_i, the client's number of training examples.
        """
        norms = {}
        counted = examples if self.weighted else 1
        self._cohort += counted
        for layer in trained:
            self.weights[layer] = self.weights.get(layer, 0) + examples
            self._trained[layer] = self._trained.get(layer, 0) + counted
            norms[layer] = self._take(layer, update, examples)
        return norms

    def trained_share(self, layer: str) -> float:
        """Return the share of the round's clients that trained a layer, by the rule's weights."""
        return self._trained[layer] / self._cohort

    @abstractmethod
    def _take(self, layer: str, update: Mapping[str, np.ndarray], examples: int) -> float:
        """Add one layer of an update and return its squared norm."""

    @property
    def sums(self) -> Mapping[str, np.ndarray]:
        """The sums so far by tensor, float64, which may be changed in place; empty for other rules."""
        return {}

    @abstractmethod
    def changes(self, layer: str) -> list[np.ndarray]:
        """Return a positive multiple of the update of each of a layer's parameters, without a copy."""

    def norm_sq(self, layer: str) -> float | None:
        """Return ‖Σ_i w_{i,l} Δ_{i,l}‖² over a layer's parameters; None if the update is no such sum."""
        return None

    @abstractmethod
    def update(self, layer: str) -> dict[str, np.ndarray]:
        """Return a layer's update by tensor, in float64."""

    @abstractmethod
    def pop(self, layer: str) -> dict[str, np.ndarray]:
        """Return a layer's update by tensor, in float64, and forget it."""


@dataclass(eq=False)
class MaskedMean(Aggregator):
    """The weighted mean update of each layer over the clients that trained it."""

    _sums: dict[str, np.ndarray] = field(default_factory=dict, init=False)
    _term: np.ndarray = field(default_factory=partial(np.empty, PIECE), init=False)

    @property
    def sums(self) -> Mapping[str, np.ndarray]:
        """Σ_i d_i Δ_i so far, by tensor."""
        return self._sums

    def _take(self, layer: str, update: Mapping[str, np.ndarray], examples: int) -> float:
        parameters, square = set(self.layers[layer].parameters), 0.0
        for name in self.layers[layer].sent:
            if name not in self._sums:
                self._sums[name] = np.zeros(update[name].shape)
            norm_sq = self._add(self._sums[name], update[name], examples)
            square += norm_sq if name in parameters else 0.0
        return square / examples**2

    def _add(self, total: np.ndarray, delta: np.ndarray, examples: int) -> float:
        """Add d_i·Δ to a sum, in pieces that fit into the processor's cache; return ‖Δ‖²."""
        norm_sq = 0.0
        for place, piece in zip(pieces(total, PIECE), pieces(delta, PIECE), strict=True):
            term = self._term[: piece.size]
            # The product is exact in float64: 24 bits of mantissa times at most 29 bits of count.
            np.multiply(piece, examples, out=term, dtype=np.float64)
            place += term
            # Not BLAS: it would wake threads for a piece this small.
            norm_sq += float(np.einsum("i,i->", term, term))
        return norm_sq

    def changes(self, layer: str) -> list[np.ndarray]:
        """Return the mean update of a layer's parameters, *times* `weights[layer]`, without a copy."""
        return [self._sums[name] for name in self.layers[layer].parameters]

    def norm_sq(self, layer: str) -> float | None:
        """Return ‖Σ_i w_{i,l} Δ_{i,l}‖² over a layer's parameters."""
        square = sum(float(np.vdot(change, change)) for change in self.changes(layer))
        return square / self.weights[layer] ** 2

    def update(self, layer: str) -> dict[str, np.ndarray]:
        """Return a copy of a layer's mean update by tensor."""
        total = self.weights[layer]
        return {name: self._sums[name] / total for name in self.layers[layer].sent}

    def pop(self, layer: str) -> dict[str, np.ndarray]:
        """Return a layer's mean update by tensor, Σ_i w_{i,l} Δ_{i,l} in float64, and forget its sum."""
        means = {}
        for name in self.layers[layer].sent:
            means[name] = self._sums.pop(name)
            means[name] /= self.weights[layer]
        return means


@dataclass(eq=False)
class Products(MaskedMean):
    """The mean update, but of adapters the best ones for the mean of the clients' products B_i·A_i.

    With the singular value decomposition U·Σ·Vᵀ of that mean, B is U·Σ and A is Vᵀ, cut to the adapters'
    rank r. The singular values after the r-th are lost. The sign of each pair of vectors is fixed, since
    it is free.
    """

    _factors: dict[str, list[tuple[np.ndarray, np.ndarray]]] = field(
        default_factory=dict, init=False
    )

    def _take(self, layer: str, update: Mapping[str, np.ndarray], examples: int) -> float:
        for first, second in factor_pairs(self.layers[layer].parameters):
            a, b = (_flat(self.model[n].astype(np.float64) + update[n]) for n in (first, second))
            self._factors.setdefault(first, []).append((examples * b, a))
        return super()._take(layer, update, examples)

    def _best(self, first: str, second: str, weight: int) -> dict[str, np.ndarray]:
        """Return the update of A and B; empty if all products are zero, which leaves the means."""
        left = np.concatenate([b for b, _ in self._factors[first]], axis=1)
        right = np.concatenate([a for _, a in self._factors[first]])
        (q, r), (p, s) = np.linalg.qr(left / weight), np.linalg.qr(right.T)
        u, sizes, v = np.linalg.svd(r @ s.T)
        if not sizes.any():
            return {}
        count = len(sizes)
        u, v = q @ u[:, :count], v[:count] @ p.T
        signs = np.sign(u[np.abs(u).argmax(0), np.arange(count)])
        b, a = u * sizes * signs, v * signs[:, None]
        found = {}
        for name, value in ((first, a), (second, b)):
            now = self.model[name].astype(np.float64)
            cut, kept = np.zeros_like(_flat(now)), tuple(map(min, _flat(now).shape, value.shape))
            cut[: kept[0], : kept[1]] = value[: kept[0], : kept[1]]
            found[name] = cut.reshape(now.shape) - now
        return found

    def changes(self, layer: str) -> list[np.ndarray]:
        """Return the update of each of a layer's parameters."""
        found = self.update(layer)
        return [found[name] for name in self.layers[layer].parameters]

    def norm_sq(self, layer: str) -> None:
        """Return None, since the update of adapters is no mean of the clients' updates."""
        return

    def update(self, layer: str) -> dict[str, np.ndarray]:
        """Return a layer's update by tensor."""
        found = super().update(layer)
        for first, second in factor_pairs(self.layers[layer].parameters):
            found |= self._best(first, second, self.weights[layer])
        return found

    def pop(self, layer: str) -> dict[str, np.ndarray]:
        """Return a layer's update by tensor, and forget it."""
        found = self.update(layer)
        super().pop(layer)
        for first, _ in factor_pairs(self.layers[layer].parameters):
            del self._factors[first]
        return found


def _flat(factor: np.ndarray) -> np.ndarray:
    """Return a factor as a matrix; that of a convolution has the kernel's sides too."""
    return factor.reshape(len(factor), -1)


class Stack(Products):
    """The mean update, but of adapters the mean product, which is added to the weight beside them.

    The new adapters have no effect: B is 0, and A is drawn as PEFT draws it, uniform up to 1 / √inputs.
    """

    def changes(self, layer: str) -> list[np.ndarray]:
        """Return the update of the weights that move, or of the head's parameters."""
        found, owner = self.update(layer), self.layers[layer]
        return [found[name] for name in owner.frozen or owner.parameters]

    def _best(self, first: str, second: str, weight: int) -> dict[str, np.ndarray]:
        """Return the update of A, of B, and of the weight beside them."""
        left = np.concatenate([b for b, _ in self._factors[first]], axis=1)
        right = np.concatenate([a for _, a in self._factors[first]])
        a, b, name = self.model[first], self.model[second], adapted_weight(first)
        rng = generator(self.how.seed, Stream.ADAPTERS, self.number, crc32(first.encode()))
        fresh = rng.uniform(-1, 1, a.shape) / np.sqrt(a.size / len(a))
        product = self.how.scale * (left / weight) @ right
        return {
            first: fresh - a,
            second: -b.astype(np.float64),
            name: product.reshape(self.model[name].shape),
        }


@dataclass(eq=False)
class TrimmedMean(Aggregator):
    """Each element's mean over the clients that trained its layer, without the extreme values.

    Of k clients the ⌊β k⌋ smallest and the ⌊β k⌋ largest values are left out, element by element. If
    ⌊β k⌋ = 0 (k < 1/β), the result is the plain mean, so a layer of one client is that client's update.

    Updates are kept until the layer is read, after the last reply. The values of a limited number of
    elements are then sorted at a time, so there is never a second copy of all updates.
    """

    weighted: ClassVar[bool] = False

    _updates: dict[str, list[np.ndarray]] = field(default_factory=dict, init=False)
    _results: dict[str, np.ndarray] = field(default_factory=dict, init=False)

    def cut(self, clients: int) -> int:
        """Return the number of values to leave out at either end, given the number of clients."""
        # A product like 0.29 · 100 is slightly below the whole number that is meant.
        return min(int(self.how.trim * clients + 1e-9), (clients - 1) // 2)

    def _take(self, layer: str, update: Mapping[str, np.ndarray], examples: int) -> float:
        for name in self.layers[layer].sent:
            self._updates.setdefault(name, []).append(update[name])
        return norm_of({name: update[name] for name in self.layers[layer].parameters}) ** 2

    def _result(self, name: str) -> np.ndarray:
        if name not in self._results:
            updates = self._updates.pop(name)  # freed once their values are combined
            self._results[name] = self._combined(updates).reshape(updates[0].shape)
        return self._results[name]

    def _combined(self, updates: list[np.ndarray]) -> np.ndarray:
        clients = len(updates)
        low, high = self.cut(clients), clients - self.cut(clients)
        result, size = np.empty(updates[0].size), max(1, TABLE // clients)
        for place, *values in zip(
            pieces(result, size), *(pieces(update, size) for update in updates), strict=True
        ):
            # Clients side by side, so that each sort is of neighbours in memory.
            table = np.stack(values, axis=1)
            table.sort(axis=1)
            place[:] = table[:, low:high].mean(axis=1, dtype=np.float64)
        return result

    def changes(self, layer: str) -> list[np.ndarray]:
        """Return the update of each of a layer's parameters, without a copy."""
        return [self._result(name) for name in self.layers[layer].parameters]

    def update(self, layer: str) -> dict[str, np.ndarray]:
        """Return a layer's update by tensor, without a copy."""
        return {name: self._result(name) for name in self.layers[layer].sent}

    def pop(self, layer: str) -> dict[str, np.ndarray]:
        """Return a layer's update by tensor, in float64, and forget it."""
        self.update(layer)
        return {name: self._results.pop(name) for name in self.layers[layer].sent}


class Median(TrimmedMean):
    """Each element's median over the clients that trained its layer, as a fully trimmed mean.

    For an even number of clients it is the mean of the two middle values. The update of a layer of one
    or two clients is therefore their plain mean, without weights: there is no majority.
    """

    def cut(self, clients: int) -> int:
        """Return the number of values to leave out at either end, so that one or two values remain."""
        return (clients - 1) // 2


AGGREGATIONS: Mapping[str, type[Aggregator]] = {
    "mean": MaskedMean,
    "median": Median,
    "stack": Stack,
    "svd": Products,
    "trimmed-mean": TrimmedMean,
}
