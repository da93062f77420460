"""The proposed method: the integer program (P1) selects layers for all clients at once."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from layerfed.client.statistics import load_statistic
from layerfed.config import ConfigError, RunConfig, Section
from layerfed.runs.records import Choice
from layerfed.selection import (
    SelectionError,
    SelectionProblem,
    Solver,
    charge_switching,
    forgive_richer,
    limit_weights,
    mean_gain,
    require_highs,
    round_costs,
    solve,
)
from layerfed.server.candidates import Candidates
from layerfed.server.theory import predicted_floor
from layerfed.strategies.base import Masks, SelectiveStrategy

logger = logging.getLogger(__name__)

NORMS = "grad_norm_sq"


def _statistic(name: str) -> str:
    load_statistic(name)
    return name


def _consistency(value: object) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value != "auto" and not number:
        raise PydanticCustomError("consistency", "a number, or auto")
    return value


Consistency = Annotated[float | Literal["auto"], BeforeValidator(_consistency)]
Statistic = Annotated[str, BeforeValidator(_statistic)]


#: The values of λ, relative, among which "auto" chooses.
LADDER = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)


class ILP(SelectiveStrategy):
    """Each round solves (P1): it selects the largest gradient norms within every budget, consistently.

    max Σ_i Σ_l m_i(l) ‖g_{i,l}‖² − λ Σ_{i<j} ‖m_i − m_j‖₁   s.t.   Σ_l c_l m_i(l) ≤ R_i   [S, (P1)]

    Between two selections (`period` > 1), clients that have masks keep them, and (P1) is solved for the
    other clients with those masks fixed.

    Clients state their own norms. A client whose gains exceed a thousand times the median client's is
    scaled down to that, and a warning says so. Otherwise the other clients' gains would be rounding
    errors beside its own (`limit_weights`).

    Three options leave the paper's program, the first one by default. All are further linear terms, so
    the same solvers prove their optima. `consistency = "auto"` solves (P1) for each λ of a ladder, and
    takes the masks for which the theory predicts the lowest error floor, E1 + E2, from the norms of
    this probe and the disagreement of the last round's updates (`predicted_floor`). The terms'
    constants are not known, so they count alike. Masks that train something go before those that train
    nothing, and of equal floors the smallest λ is taken. `penalty = "affordable"` does not charge a
    client for having more than a poorer one (`forgive_richer`). `switching` charges for leaving the
    layers of the last selection (`charge_switching`).
    """

    class Options(Section):
        """Settings of the integer program."""

        consistency: Consistency = "auto"
        """λ. With 0 each client gets its own best layers; larger values make masks more equal, and
        negative values make them differ. "auto" chooses it in each selection."""
        consistency_scale: Literal["relative", "raw"] = "relative"
        """The unit of λ. `relative`: the mean selected gain of a client, so one value suits all models
        and tasks, and no client's claims decide it. `raw`: squared norms, as in the paper."""
        statistic: Statistic = "grad_norm_sq"
        """The gain of a layer on a client: a statistic of the probe. The paper's is the default."""
        penalty: Literal["paper", "affordable"] = "paper"
        """The differences between two masks that λ charges: all, or those that the poorer client can
        avoid."""
        switching: Annotated[float, Field(ge=0)] = 0.0
        """The charge for each layer in which a client's mask differs from its last selection: relative
        to the mean selected gain, or raw."""
        solver: Literal["auto", "lagrangian", "milp"] = "auto"
        """`auto` uses the Lagrangian bound, and the integer program only for a gap that is left."""
        solver_seconds: Annotated[float, Field(gt=0)] = 10.0
        """Time limit in each round. A gap that is left at the limit is logged and recorded."""
        solver_gap: Annotated[float, Field(ge=0, lt=1)] = 1e-6
        """Relative gap at which a solution counts as optimal."""
        solver_rounding: Annotated[float, Field(ge=0, lt=1)] = 0.02
        """Largest share of a budget that rounding may take if costs are measured on devices. 0 keeps
        costs exact, which is slow from 13 layers on."""

    name = "ilp"
    statistics: tuple[str, ...] = (NORMS,)
    masks = "shared"
    options: Options

    @classmethod
    def masks_with(cls, options: Options) -> Masks:
        """Return "shared" if λ is above 0, since a large λ makes all masks equal.

        With the penalty on what is affordable, a large λ makes those of equal budgets equal.
        """
        if options.consistency == "auto" or options.consistency <= 0:
            return "own"
        return "shared" if options.penalty == "paper" else "within-budget"

    @classmethod
    def refuse(cls, options: Options, config: RunConfig) -> None:
        """Refuse what a search for λ cannot know, and wealth of networks that differ."""
        if options.penalty == "affordable" and config.train.skip != "none":
            raise ConfigError(
                f"strategy.penalty = 'affordable' does not go with train.skip = '{config.train.skip}': "
                "budgets are compared by what all layers cost, and each client skips others; set "
                "strategy.penalty=paper"
            )
        if options.consistency == "auto" and config.train.skip != "none":
            raise ConfigError(
                f"strategy.consistency = 'auto' does not go with train.skip = '{config.train.skip}': it "
                "needs the gradients of all layers, and a client has none of the blocks that it skips; "
                "give a number, such as strategy.consistency=0.1"
            )
        if options.consistency == "auto" and options.consistency_scale == "raw":
            raise ConfigError(
                "strategy.consistency = 'auto' chooses among relative values; give a number, such as "
                "strategy.consistency=10, or set strategy.consistency-scale=relative"
            )

    def check(self) -> None:
        """Probe the statistic that the options name, and norms if λ is to be found.

        Raises ConfigError if the options name a solver that is not installed here.
        """
        if self.options.solver == "milp":
            try:
                require_highs()
            except SelectionError as error:
                raise ConfigError(f"strategy.solver = 'milp': {error}") from None
        wanted = (self.options.statistic, *([NORMS] if self.options.consistency == "auto" else []))
        self.statistics = tuple(dict.fromkeys(wanted))

    def select(self, candidates: Candidates) -> Choice:
        """Solve (P1), or the best of several, on the statistic."""
        options = self.options
        problem, rounding = prepared(
            candidates, candidates.statistics[options.statistic], options.solver_rounding
        )
        if options.consistency != "auto":
            return self._solved(
                problem, candidates, options.consistency, rounding, options.solver_seconds
            )
        until, choices = time.monotonic() + options.solver_seconds, list[Choice]()
        for number, value in enumerate(LADDER):
            left = max(until - time.monotonic(), 0.01 * options.solver_seconds)
            seconds = left / (len(LADDER) - number)
            choices.append(self._solved(problem, candidates, value, rounding, seconds))
        disagreement = float(self.kept.get("disagreement", 1.0))
        # What stays on a client is never averaged.
        names = self.layers.personal
        personal = [i for i, block in enumerate(self.layers.blocks) if block.name in names]
        norms, able = (
            np.delete(table, personal, axis=1)
            for table in (candidates.bounded(NORMS), problem.affordable)
        )
        floors = []
        for choice in choices:
            masks = np.delete(choice.masks, personal, axis=1)
            floors.append(predicted_floor(norms, candidates.counts, masks, disagreement, able))
        # A round that trains nothing is lost, whatever the theory says of its masks.
        useful = [i for i, choice in enumerate(choices) if choice.masks.any()] or [0]
        lowest = min(floors[i] for i in useful)
        best = next(i for i in useful if floors[i] <= lowest + 1e-9 * abs(lowest))
        return replace(choices[best], consistency=LADDER[best], disagreement=disagreement)

    def _solved(
        self,
        problem: SelectionProblem,
        candidates: Candidates,
        consistency: float,
        rounding: float,
        seconds: float,
    ) -> Choice:
        options, constant = self.options, 0.0
        # λ and the switching cost in the unit of gains.
        own = 1.0 if options.consistency_scale == "raw" else mean_gain(problem)
        clients = 1 if options.consistency_scale == "raw" else max(problem.clients, 1)
        problem = replace(problem, consistency=consistency * own / clients)
        last = candidates.last
        if options.switching and last is not None:
            problem, constant = charge_switching(problem, last, options.switching * own)
        if options.penalty == "affordable":
            problem = forgive_richer(problem)
        limits = (seconds, options.solver_gap)
        choice = solved(problem, candidates, options.solver, *limits, constant=constant)
        return replace(choice, rounding=rounding)


def prepared(
    candidates: Candidates, values: np.ndarray, rounding: float = 0.02
) -> tuple[SelectionProblem, float]:
    """Return (P1) without a consistency term on these gains, and the share that rounding took.

    Parameters
    ----------
    candidates : Candidates
    values : numpy.ndarray
        Gains, shape (n, L).
    rounding : float
        The largest share of a budget that rounding of measured costs may take.
    """
    problem = SelectionProblem(
        values, candidates.costs, candidates.budgets, 0.0, candidates.depth_costs
    )
    problem, taken = round_costs(problem, rounding)
    problem, weights = limit_weights(problem)
    for client in np.flatnonzero(weights < 1.0):
        logger.warning(
            "the client of partition %d claims gains %.1e times the largest that counts; they "
            "are scaled down",
            candidates.clients[int(client)],
            1.0 / weights[client],
        )
    return problem, taken


def solved(
    problem: SelectionProblem,
    candidates: Candidates,
    solver: Solver = "auto",
    seconds: float = 10.0,
    gap: float = 1e-6,
    *,
    constant: float = 0.0,
) -> Choice:
    """Solve a problem with the candidates' held masks fixed.

    Parameters
    ----------
    problem : SelectionProblem
    candidates : Candidates
    solver, seconds, gap
        As in `layerfed.selection.solve`.
    constant : float
        Taken from objective and bound: the part of the objective that no mask changes.
    """
    working = _holding(problem, candidates) if candidates.held else problem
    try:
        found = solve(working, solver=solver, time_limit=seconds, gap=gap)
    except SelectionError as error:
        logger.warning("%s; this round's masks are those of the solver 'lagrangian'", error)
        found = solve(working, solver="lagrangian", time_limit=seconds, gap=gap)
    # The artificial gains of held masks do not count in the objective.
    constant += float((working.values - problem.values)[found.masks].sum())
    objective, bound = found.objective - constant, found.bound - constant
    return Choice(
        masks=found.masks,
        solver=found.solver,
        objective=objective,
        bound=bound,
        gap=problem.relative_gap(objective, bound) if constant else found.gap,
    )


def _holding(problem: SelectionProblem, candidates: Candidates) -> SelectionProblem:
    """Return (P1) with some clients' masks held: they afford no other layer, and gain by keeping theirs.

    Dropping a layer changes k (n − k) by at most n − 1. A held layer with a gain of twice λ (n − 1) is
    therefore never dropped, whatever the other clients choose.
    """
    worth = 2.0 * abs(problem.consistency) * (problem.clients - 1) + float(problem.values.max())
    values, costs = problem.values.copy(), problem.cost_matrix.copy()
    budgets, depth = problem.budgets.copy(), problem.depth_matrix.copy()
    for row, masks in candidates.held.items():
        mask = masks.any(axis=0)
        values[row] = np.where(mask, worth or 1.0, 0.0)
        costs[row] = np.where(mask, 0.0, 1.0)
        budgets[row], depth[row] = 0.0, 0.0
    return SelectionProblem(values, costs, budgets, problem.consistency, depth)
