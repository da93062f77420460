"""Layers drawn with probabilities by their Fisher score, or by a geometric pattern."""

from __future__ import annotations

from itertools import combinations
from typing import Literal

import numpy as np

from layerfed.config import Section
from layerfed.config.seeding import Stream, generator
from layerfed.runs.records import Choice
from layerfed.server.candidates import Candidates
from layerfed.strategies.base import SelectiveStrategy
from layerfed.strategies.ranking import by_orders


class FedHeLLo(SelectiveStrategy):
    """Each client draws the layers of its budget; important layers are up to three times as likely.

    In Fed-HeLLo (Zhang et al., arXiv 2506.12213) layers have weights 1, 2 or 3, and a client draws its
    layers without replacement with probabilities proportional to them.

    `allocation = "fisher"`: the layers' Fisher scores fall into three groups by the k-means rule, and
    the group with the highest scores has weight 3. A score is Σ_p ‖F_p‖ over the layer's tensors, with F
    the diagonal of the empirical Fisher matrix (`client/statistics.py`). The authors' code computes it
    on public data of the server; here it is the mean of the clients' scores, weighted by their examples.
    A client whose scores sum to more than three times the median client's is scaled down to that.
    In that code a group's weight is that of its number, which k-means gives at random; here groups are
    in the order of their scores.

    Patterns need no score: `bottleneck` gives weight 3 to both ends and 1 to the middle third, as in the
    code's configuration for 12 layers, up to one layer's shift; `uniform` gives all the same. `triangle`
    gives 3 to the third at the input, and `inverted-triangle` to that at the output. The paper was read
    in abstract only, so which end a triangle's base is could not be confirmed. The paper's layers are
    LoRA modules; here they are the run's units.
    """

    class Options(Section):
        """The weights of the layers."""

        allocation: Literal["fisher", "triangle", "inverted-triangle", "bottleneck", "uniform"] = (
            "fisher"
        )
        """The rule for the weights."""

    name = "fed-hello"
    statistics: tuple[str, ...] = ("fisher",)
    masks = "own"
    options: Options

    def check(self) -> None:
        """Probe nothing if the weights follow a pattern."""
        if self.options.allocation != "fisher":
            self.statistics = ()

    def select(self, candidates: Candidates) -> Choice:
        """Fill each budget in an order drawn by the weights."""
        weights = self._weights(candidates)
        odds, size = weights / weights.sum(), len(weights)
        draws = (
            generator(candidates.seed, Stream.MASK, candidates.round, client)
            for client in candidates.clients
        )
        orders = [rng.choice(size, size, replace=False, p=odds) for rng in draws]
        return by_orders(candidates, orders)

    def _weights(self, candidates: Candidates) -> np.ndarray:
        """Return the weight of each layer, shape (L,)."""
        allocation, layers = self.options.allocation, candidates.costs.shape[1]
        if allocation == "fisher":
            scores = candidates.bounded("fisher")
            return groups(np.average(scores, axis=0, weights=candidates.counts))
        depth = np.arange(layers) / max(layers - 1, 1)
        width = {
            "triangle": 1.0 - depth,
            "inverted-triangle": depth,
            "bottleneck": np.abs(2.0 * depth - 1.0),
            "uniform": np.zeros(layers),
        }[allocation]
        return np.asarray(1.0 + np.minimum(np.floor(3.0 * width + 1e-9), 2.0))


def groups(scores: np.ndarray) -> np.ndarray:
    """Return the group of each score, 1 for the lowest to 3 for the highest, by exact 3-means.

    The groups minimise the sum of squared distances to their means. In one dimension they are intervals,
    so two cuts of the sorted scores are tried in all places.
    """
    ranked = np.sort(scores)
    if len(ranked) < 3:
        rank = np.unique(scores, return_inverse=True)[1]
        return np.asarray(3.0 + rank - rank.max())

    def spread(cuts: tuple[int, int]) -> float:
        return sum(len(part) * float(np.var(part)) for part in np.split(ranked, cuts))

    first, second = min(combinations(range(1, len(ranked)), 2), key=spread)
    return np.asarray(1.0 + (scores >= ranked[first]) + (scores >= ranked[second]))
