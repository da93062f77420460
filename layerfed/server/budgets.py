"""Clients' budgets: R_i of the constraint Σ_l c_l m_i(l) ≤ R_i."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from layerfed.config import BudgetConfig, ConfigError
from layerfed.config.seeding import Stream, generator
from layerfed.exchange import Description
from layerfed.models.layers import LayerMap, layer_costs

__all__ = ["Budgets"]


class Budgets:
    """The budget of every client.

    Parameters
    ----------
    config : BudgetConfig
        `identical`: R for all. `half-normal`: R_i = min + |N(0, σ²)| with σ = (max − min)/2, drawn
        again while above max, and whole if the unit is layers ([S] names the distribution and its
        bounds; σ is LayerFed's choice). `per-node`: the budget in the node's own configuration.
    costs : numpy.ndarray | None
        c_l, the same for all clients, shape (L,); None if each client states measured costs.
    seed : int
        The run's seed. A client's budget depends only on it and on the client's partition id.
    kept : bool (default: True)
        Whether the run's strategy respects budgets. If not, every budget is accepted.
    least : Callable[[numpy.ndarray], float] (default: numpy.min)
        Returns the cost of the least that a client can train, given what each layer costs alone, (L,).

    Raises
    ------
    ConfigError
        If a budget exceeds the cost of all blocks or is below the cheapest block, or if whole budgets
        are drawn between bounds that are not whole.
    """

    def __init__(
        self,
        config: BudgetConfig,
        costs: np.ndarray | None,
        seed: int,
        *,
        kept: bool = True,
        least: Callable[[np.ndarray], float] = np.min,
    ) -> None:
        self.config = config
        self._least = least
        self.costs = costs
        self.seed = seed
        self._kept = kept
        if kept and config.kind == "half-normal" and config.unit == "layers":
            for key in ("min", "max"):
                value = getattr(config, key)
                if value % 1:
                    raise ConfigError(
                        f"budget.{key} = {value:g} is no whole number; half-normal budgets in "
                        "layers are whole, and so are their bounds"
                    )
        if costs is not None and (problem := self._problem(costs, np.zeros_like(costs))):
            raise ConfigError(problem[1])

    def _problem(self, costs: np.ndarray, depth: np.ndarray) -> tuple[str, str] | None:
        """Return "above" if a budget exceeds the whole model, "below" if it affords no block, or None.

        Each comes with a message.
        """
        if not self._kept:
            return None
        config = self.config
        keys = {"identical": ("layers",), "half-normal": ("min", "max"), "per-node": ()}
        total, least = costs.sum() + depth[0], self._least(costs + depth)
        for key in keys[config.kind]:
            value = getattr(config, key)
            if value > total * (1 + 1e-9):
                return "above", (
                    f"budget.{key} = {value:g} is above the whole model: its {len(costs)} selectable "
                    f"layers cost {total:g} {config.unit}; lower it, or use strategy.name = 'full'"
                )
        for key in keys[config.kind][-1:]:
            value = getattr(config, key)
            if value < least:
                return "below", (
                    f"budget.{key} = {value:g} {config.unit} is below the least that a client can "
                    f"train ({least:g})"
                )
        return None

    def costs_of(self, client: Description) -> tuple[np.ndarray, np.ndarray]:
        """Return c_l and D_l of one client, shape (L,) each; D is zero for additive units.

        Raises
        ------
        ConfigError
            If costs are measured on devices and this client states none.
        """
        if self.costs is not None:
            return self.costs, np.zeros_like(self.costs)
        if client.costs is None or client.depth_costs is None:
            raise ConfigError(
                f"budget.unit = '{self.config.unit}' is measured on each device, but the client of "
                f"partition {client.partition} stated no costs"
            )
        return np.array(client.costs), np.array(client.depth_costs)

    def check_stated(self, client: Description) -> None:
        """Refuse a client whose description lacks something that these budgets need.

        Raises
        ------
        ConfigError
            If its own budget or its measured costs are missing.
        """
        self.of(client)
        self.costs_of(client)

    def check_measured(self, clients: Iterable[Description]) -> None:
        """Refuse budgets that do not fit the costs that clients measured, in measured units.

        Raises
        ------
        ConfigError
            If every client could train the whole model, or no client could train a single block.
        """
        if self.costs is not None:
            return
        problems = [self._problem(*self.costs_of(client)) for client in clients]
        kinds = {problem and problem[0] for problem in problems}
        if len(kinds) == 1 and (first := problems[0]) is not None:
            raise ConfigError(first[1])

    def of(self, client: Description) -> float:
        """Return R_i of one client: the smaller of the run's budget and its node's own.

        Raises
        ------
        ConfigError
            If budgets are per node and the node states none.
        """
        own = np.inf if client.budget is None else client.budget
        if self.config.kind == "identical":
            return min(self.config.layers, own)
        if self.config.kind == "half-normal":
            return min(self._half_normal(client.partition), own)
        if client.budget is None:
            raise ConfigError(
                f"budget.kind = 'per-node', but the node of partition {client.partition} states no "
                'budget; start it with --node-config "budget=2", or choose another budget.kind'
            )
        return client.budget

    def _half_normal(self, partition: int) -> float:
        low, high = self.config.min, self.config.max
        rng = generator(self.seed, Stream.BUDGET, partition)
        while True:
            value = low + abs(rng.normal(0.0, (high - low) / 2))
            if self.config.unit == "layers":
                value = float(np.rint(value))
            if value <= high:
                return value

    @classmethod
    def identical(cls, limit: float, layers: LayerMap) -> Budgets:
        """Return budgets of `limit` layers for every client."""
        return cls(BudgetConfig(layers=limit), layer_costs(layers), seed=0)

    def __str__(self) -> str:
        """Describe the budgets in a few words."""
        config = self.config
        if not self._kept:
            return "none but what nodes state themselves"
        if config.kind == "identical":
            return f"{config.layers:g} {config.unit} each"
        if config.kind == "half-normal":
            return f"half-normal on [{config.min:g}, {config.max:g}] {config.unit}"
        return f"each node's own, in {config.unit}"
