"""Which layers: what a strategy is made of, and how a round comes to its masks."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from layerfed.config import RunConfig
from layerfed.exchange import Description
from layerfed.models.layers import LayerMap
from layerfed.runs.records import Choice, SelectionRecord
from layerfed.server.aggregation import Aggregator
from layerfed.server.budgets import Budgets
from layerfed.server.candidates import Candidates, check_choice
from layerfed.server.memory import HELD, Memory

__all__ = ["Selecting"]


class Selecting(ABC):
    """The part of a strategy that chooses layers; `SelectiveStrategy` runs the rounds around it.

    A concrete strategy says which statistics it needs and overrides `select`; seldom more.

    Parameters
    ----------
    layers, budget, period, theory, seed
        As in `SelectiveStrategy`.
    """

    name: ClassVar[str]
    statistics: tuple[str, ...] = ()
    """What `select` needs of a probe; nothing means that no probe is made."""
    within_budget: ClassVar[bool] = True
    """Whether the strategy keeps to the run's budgets."""

    def __init__(
        self, layers: LayerMap, budget: Budgets | float, *, period: int, theory: bool, seed: int
    ) -> None:
        self.layers = layers
        self.budgets = budget if isinstance(budget, Budgets) else Budgets.identical(budget, layers)
        self.period = period
        self.theory = theory
        self.seed = seed
        self._memory = Memory()

    # ------------------------------------------------------------- what a strategy may override
    @classmethod
    def options(cls, config: RunConfig) -> dict[str, Any]:
        """Return this strategy's own arguments from a run's configuration.

        Settings of other strategies are left alone, so that one configuration serves them all.
        """
        return {}

    @abstractmethod
    def select(self, candidates: Candidates) -> Choice:
        """Choose the layers each client trains: masks of shape (n, L) within the budgets."""

    def check(self) -> None:  # noqa: B027
        """Refuse settings this strategy cannot work with, before any client does."""

    def selects_in(self, server_round: int) -> bool:
        """Say whether layers are selected anew in a round, from 1; otherwise masks are kept."""
        return (server_round - 1) % self.period == 0

    def bounded(self, server_round: int) -> bool:
        """Say whether a round's masks must keep to the run's budgets."""
        return self.within_budget

    def instructions(self, choice: Choice, row: int) -> dict[str, Any]:
        """Return what one client's training instruction says besides its mask."""
        return {}

    def applied(self, mean: Aggregator) -> Collection[str]:
        """Choose which of the layers that clients trained move the global model: all of them."""
        return mean.weights

    # --------------------------------------------------------------------------- a round's masks
    def probed_in(self, server_round: int) -> tuple[str, ...]:
        """Return the statistics that clients are asked for in a round; none means no probe."""
        wanted = self.statistics if self.selects_in(server_round) else ()
        if self.theory and "grad_norm_sq" not in wanted:
            return (*wanted, "grad_norm_sq")
        return wanted

    def choose(
        self,
        server_round: int,
        clients: Sequence[Description],
        probed: Mapping[int, Mapping[str, np.ndarray]],
    ) -> SelectionRecord:
        """Turn statistics, costs and budgets into masks, or keep those of the last selection.

        Parameters
        ----------
        server_round : int
            t, from 1.
        clients : Sequence[Description]
        probed : Mapping[int, Mapping[str, numpy.ndarray]]
            {partition: {statistic: (L,)}}, of all these clients.
        """
        statistics = {
            name: np.stack([probed[client.partition][name] for client in clients])
            for name in self.probed_in(server_round)
        }
        candidates = Candidates.of(server_round, clients, self.budgets, statistics, self.seed)
        began = time.perf_counter()
        if anew := self.selects_in(server_round):
            choice = self._checked(candidates)
            self._memory.learn(candidates, choice)
        else:
            candidates, choice = self._memory.complete(
                candidates, self._checked, bounded=self.bounded(server_round)
            )
        return SelectionRecord(
            clients=candidates.clients,
            layers=[block.name for block in self.layers.blocks],
            budgets=candidates.budgets,
            costs=candidates.costs,
            depth_costs=candidates.depth_costs,
            statistics=statistics,
            choice=choice,
            seconds=time.perf_counter() - began,
            held=[candidates.clients[row] for row in candidates.held],
            assumed={} if anew or choice.solver == HELD else candidates.statistics,
        )

    def _checked(self, candidates: Candidates) -> Choice:
        choice = self.select(candidates)
        check_choice(self.name, choice, candidates, bounded=self.bounded(candidates.round))
        return choice
