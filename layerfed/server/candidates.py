"""The input of a strategy's `select`, and the check of its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from layerfed.config import ConfigError
from layerfed.exchange import Description
from layerfed.runs.records import Choice
from layerfed.selection import SelectionProblem
from layerfed.selection.preparing import MOST_FOR_SCALE
from layerfed.server.budgets import Budgets

__all__ = ["Candidates", "check_choice"]


@dataclass(frozen=True)
class Candidates:
    """The input of `select`: n sampled clients and L selectable layers.

    Attributes
    ----------
    round : int
        The round t, from 1.
    clients : Sequence[int]
        Partition ids, length n.
    budgets : numpy.ndarray
        R_i, shape (n,).
    costs : numpy.ndarray
        c_{i,l} in the unit of the budgets, shape (n, L). Shape (L,) stands for equal costs.
    depth_costs : numpy.ndarray
        D_{i,l}, shape (n, L), non-increasing in l: the extra cost of client i if l is its lowest layer.
        Zero for units that add up.
    statistics : Mapping[str, numpy.ndarray]
        Each statistic of the strategy, shape (n, L).
    seed : int
        The run's seed.
    examples : numpy.ndarray
        d_i, as each client states it, shape (n,); ones by default.
    counts : numpy.ndarray
        The number of examples that each client counts as (`federation.max-examples`), shape (n,); ones
        by default.
    limits : numpy.ndarray
        Each node's own budget, shape (n,); infinite if it states none.
    held : Mapping[int, numpy.ndarray]
        By row: the masks that a client keeps from the last selection, shape (S, L), one after the other.
        S is 1 unless the client changes its layers within a round. `select` may read them; its result
        for those rows is not used.
    last : numpy.ndarray | None
        The layers of each client's last selection, shape (n, L), as numbers from 0 to 1. A client that
        was never selected has the mean of those that were last. None in the first selection, and between
        two.
    runs : numpy.ndarray
        Booleans, shape (n, L): the blocks that are not skipped; see `running`.
    """

    round: int
    clients: Sequence[int]
    budgets: np.ndarray
    costs: np.ndarray
    statistics: Mapping[str, np.ndarray]
    seed: int
    depth_costs: np.ndarray = field(default_factory=lambda: np.zeros(1))
    examples: np.ndarray = field(default_factory=lambda: np.ones(1))
    counts: np.ndarray = field(default_factory=lambda: np.ones(1))
    limits: np.ndarray = field(default_factory=lambda: np.full(1, np.inf))
    held: Mapping[int, np.ndarray] = field(default_factory=dict)
    last: np.ndarray | None = None
    runs: np.ndarray = field(default_factory=lambda: np.ones(1, dtype=bool))

    def __post_init__(self) -> None:
        """Expand costs, numbers of examples and limits to one entry for each client."""
        shape = (len(self.clients), np.shape(self.costs)[-1])
        for name in ("costs", "depth_costs", "runs"):
            object.__setattr__(self, name, np.broadcast_to(getattr(self, name), shape))
        # The run records them, so a strategy must not work in place.
        frozen = {name: _read_only(rows) for name, rows in self.statistics.items()}
        object.__setattr__(self, "statistics", frozen)
        for name in ("examples", "counts", "limits"):
            object.__setattr__(self, name, np.broadcast_to(getattr(self, name), shape[:1]))

    @classmethod
    def of(
        cls,
        server_round: int,
        described: Sequence[Description],
        budgets: Budgets,
        statistics: Mapping[str, np.ndarray],
        seed: int,
    ) -> Candidates:
        """Build the candidates of a round from its clients' descriptions.

        Raises
        ------
        ConfigError
            If a client states no budget or no costs, and the run needs them.
        """
        costs = [budgets.costs_of(client) for client in described]
        return cls(
            round=server_round,
            clients=[client.partition for client in described],
            budgets=np.array([budgets.of(client) for client in described]),
            costs=np.stack([own for own, _ in costs]),
            depth_costs=np.stack([depth for _, depth in costs]),
            statistics=statistics,
            seed=seed,
            examples=np.array([client.examples for client in described]),
            limits=np.array([np.inf if c.budget is None else c.budget for c in described]),
        )

    def bounded(self, statistic: str) -> np.ndarray:
        """Return a statistic of 0 or more, shape (n, L), with clients that claim too much scaled down.

        Clients state their own numbers, and a sum or mean over clients would be that of the largest
        alone. So no client's sum over its layers is above `MOST_FOR_SCALE` times the median client's.
        """
        claimed = self.statistics[statistic]
        totals = claimed.sum(axis=1)
        some = np.sort(totals[totals > 0])
        if not len(some):
            return claimed
        most = MOST_FOR_SCALE * some[(len(some) - 1) // 2]
        return np.asarray(claimed * np.minimum(1.0, most / np.maximum(totals, most))[:, None])

    def running(self, runs: np.ndarray) -> Candidates:
        """Return these candidates with blocks that some clients skip, shape (n, L).

        To its client such a block costs more than it has, and its statistics are 0.
        """
        limits = np.where(np.isfinite(self.limits), self.limits, 0.0)
        beyond = 2.0 * np.maximum(self.budgets, limits)[:, None] + 1.0
        found = {name: np.where(runs, table, 0.0) for name, table in self.statistics.items()}
        costs = np.where(runs, self.costs, beyond)
        return replace(self, runs=runs, costs=costs, statistics=found)

    def problem(self, rows: Sequence[int] | np.ndarray) -> SelectionProblem:
        """Return the budgets and costs of some clients as a problem without gains, to check masks."""
        return SelectionProblem(
            np.zeros((len(rows), self.costs.shape[1])),
            self.costs[rows],
            self.budgets[rows],
            0.0,
            self.depth_costs[rows],
        )


def _read_only(rows: np.ndarray) -> np.ndarray:
    view = rows.view()
    view.flags.writeable = False
    return view


def check_choice(name: str, choice: Choice, candidates: Candidates, *, bounded: bool) -> None:
    """Refuse a strategy's result that breaks the rules, before any client trains it.

    Parameters
    ----------
    name : str
        The strategy's name.
    choice : Choice
    candidates : Candidates
        The input of the selection.
    bounded : bool
        Whether masks must keep to the budgets. If a client trains several masks, each one must.

    Raises
    ------
    ConfigError
        If masks have another shape or type, or exceed a budget.
    """
    shape = candidates.costs.shape
    if not isinstance(choice, Choice) or not isinstance(choice.masks, np.ndarray):
        what = choice.masks if isinstance(choice, Choice) else choice
        raise ConfigError(
            f"strategy '{name}' answered {type(what).__name__}; a Choice with a numpy array of masks is "
            "due"
        )
    masks = choice.masks
    if masks.shape != shape or masks.dtype != np.bool_:
        raise ConfigError(
            f"strategy '{name}' gave masks of {masks.dtype}{masks.shape}; booleans of shape {shape} "
            "are due: a row for each client, a column for each layer"
        )
    if choice.schedules is not None:
        _check_schedules(name, choice)
    if choice.sends.shape != shape or (choice.sends & ~masks).any():
        raise ConfigError(f"strategy '{name}' has clients send layers that they do not train")
    if not bounded:
        return
    schedules = [choice.schedule(row) for row in range(len(masks))]
    rows = np.repeat(np.arange(len(masks)), [len(schedule) for schedule in schedules])
    problem, trained = candidates.problem(rows), np.concatenate(schedules)
    if not problem.feasible(trained):
        spent = problem.spent(trained)
        worst = int(np.argmax(spent - problem.budgets))
        raise ConfigError(
            f"strategy '{name}' spends {spent[worst]:g} of a client's budget of "
            f"{problem.budgets[worst]:g}"
        )


def _check_schedules(name: str, choice: Choice) -> None:
    """Refuse schedules that are not one for each client, of masks whose union is the client's mask."""
    schedules, masks = choice.schedules or (), choice.masks
    if len(schedules) != len(masks):
        raise ConfigError(
            f"strategy '{name}' gave {len(schedules)} schedules; {len(masks)} are due, one a client"
        )
    for schedule, mask in zip(schedules, masks, strict=True):
        shape, dtype = np.shape(schedule), np.asarray(schedule).dtype
        if len(shape) != 2 or not shape[0] or shape[1] != len(mask) or dtype != np.bool_:
            raise ConfigError(
                f"strategy '{name}' gave a schedule of {dtype}{shape}; booleans of shape "
                f"(S, {len(mask)}) are due: a row for each mask that the client trains"
            )
        if (np.any(schedule, axis=0) != mask).any():
            raise ConfigError(
                f"strategy '{name}' gave a schedule whose masks together are not the client's mask"
            )
