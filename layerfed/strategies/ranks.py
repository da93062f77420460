"""All layers, in as many ranks of their adapters as a client's budget affords."""

from __future__ import annotations

from typing import Any

import numpy as np

from layerfed.config import ConfigError, RunConfig
from layerfed.models.layers import LayerMap
from layerfed.runs.records import Choice
from layerfed.server.candidates import Candidates
from layerfed.strategies.base import SelectiveStrategy


def _allowed(config: RunConfig) -> dict[str, tuple[tuple[str, ...], str]]:
    """Return the values that some keys may have, and why they may have no others."""
    units: tuple[str, ...] = ("parameters", "bytes")
    second = ""
    if config.model.personal_rank:
        units, second = ("bytes",), ", and the second ones of model.personal-rank are trained whole"
    return {
        "model.tuning": (("lora",), "layers have no ranks"),
        "budget.unit": (
            units,
            f"r ranks do not cost r times as much as one in other units{second}",
        ),
        "server.aggregation": (
            ("svd", "stack"),
            "factors of different ranks have no mean, and their products have one",
        ),
    }


class Ranks(SelectiveStrategy):
    """Every client trains the first r_i ranks of every adapter; its budget decides r_i.

    Of adapters of rank r that cost c_l, the largest r_i with (r_i / r) · Σ_l c_l ≤ R_i. This is how
    FlexLoRA (Bai et al., arXiv 2402.11505) and FLoRA (Wang et al., arXiv 2409.05976) spend a client's
    resources. There a client holds adapters of its own rank. Here a budget bounds what is trained, as
    with every strategy: the client trains and sends the first r_i rows of A and columns of B, and the
    others stay as they are in its model. After `server.aggregation = "svd"` these are the ranks with
    the largest singular values. A client that cannot afford one rank trains the head.
    """

    name = "ranks"

    @classmethod
    def refuse(cls, options: Any, config: RunConfig) -> None:
        """Refuse runs without ranks, or in which a rank costs no share of a block."""
        flat = config.to_flat()
        for key, (values, why) in _allowed(config).items():
            if flat[key] not in values:
                raise ConfigError(
                    f"{key} = '{flat[key]}' does not go with strategy.name = 'ranks': {why}; choose "
                    f"{key}={' or '.join(values)}, or strategy.name=full"
                )

    @classmethod
    def exists(cls, config: RunConfig) -> bool:
        """Return whether the run has ranks that budgets can count."""
        flat = config.to_flat()
        return all(flat[key] in values for key, (values, _) in _allowed(config).items())

    @classmethod
    def least(cls, costs: np.ndarray, layers: LayerMap) -> float:
        """Return the cost of one rank of all adapters, or of a layer if that is less."""
        return min(float(costs.min()), float(costs.sum()) / layers.rank)

    def bounded(self, server_round: int) -> bool:
        """Return False, since masks do not tell what a client trains of each block."""
        return False

    def selects_in(self, server_round: int) -> bool:
        """Return True: nothing is probed, and ranks follow from present budgets."""
        return True

    def select(self, candidates: Candidates) -> Choice:
        """Select all layers, in the ranks that each client affords."""
        # Skipped blocks cost more than any budget, and none is trained.
        costs = np.where(candidates.runs, candidates.costs, 0.0).sum(axis=1)
        share = np.minimum(candidates.budgets / costs, 1.0)
        # A budget of exactly k ranks affords k.
        ranks = np.floor(self.layers.rank * share * (1 + 1e-9)).astype(int)
        return Choice(np.repeat(ranks[:, None] > 0, candidates.costs.shape[1], 1), ranks=ranks)
