"""The proposed method: the integer program (P1) selects layers for all clients at once."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from layerfed.config import Section
from layerfed.runs.records import Choice
from layerfed.selection import (
    SelectionProblem,
    limit_weights,
    round_costs,
    scale_consistency,
    solve,
)
from layerfed.server.candidates import Candidates
from layerfed.strategies.base import Masks, SelectiveStrategy

logger = logging.getLogger(__name__)


class ILP(SelectiveStrategy):
    """Each round solves (P1): it selects the largest gradient norms within every budget, consistently.

    max Σ_i Σ_l m_i(l) ‖g_{i,l}‖² − λ Σ_{i<j} ‖m_i − m_j‖₁   s.t.   Σ_l c_l m_i(l) ≤ R_i   [S, (P1)]

    Between two selections (`period` > 1), clients that have masks keep them, and (P1) is solved for the
    other clients with those masks fixed.

    Clients state their own norms. A client whose gains exceed a thousand times the median client's is
    scaled down to that, and a warning says so. Otherwise the other clients' gains would be rounding
    errors beside its own (`limit_weights`).

    """

    class Options(Section):
        """Settings of the integer program."""

        consistency: float = 0.1
        """λ. With 0 each client gets its own best layers; larger values make masks more equal, and
        negative values make them differ."""
        consistency_scale: Literal["relative", "raw"] = "relative"
        """The unit of λ. `relative`: the mean selected gain of a client, so one value suits all models
        and tasks, and no client's claims decide it. `raw`: squared norms, as in the paper."""
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
    statistics = ("grad_norm_sq",)
    masks = "shared"
    options: Options

    @classmethod
    def masks_with(cls, options: Options) -> Masks:
        """Return "shared" if λ is above 0, since a large λ makes all masks equal."""
        return "shared" if options.consistency > 0 else "own"

    def select(self, candidates: Candidates) -> Choice:
        """Solve (P1) on the squared gradient norms."""
        values = candidates.statistics["grad_norm_sq"]
        problem = SelectionProblem(
            values, candidates.costs, candidates.budgets, 0.0, candidates.depth_costs
        )
        problem, rounding = round_costs(problem, self.options.solver_rounding)
        problem, weights = limit_weights(problem)
        for client in np.flatnonzero(weights < 1.0):
            logger.warning(
                "the client of partition %d claims gains %.1e times the largest that counts; they "
                "are scaled down",
                candidates.clients[int(client)],
                1.0 / weights[client],
            )
        problem = replace(problem, consistency=self._raw_consistency(problem))
        solved = _holding(problem, candidates) if candidates.held else problem
        found = solve(
            solved,
            solver=self.options.solver,
            time_limit=self.options.solver_seconds,
            gap=self.options.solver_gap,
        )
        # The artificial gains of held masks, which do not count in the objective.
        promised = float((solved.values - problem.values)[found.masks].sum())
        objective, bound = found.objective - promised, found.bound - promised
        return Choice(
            masks=found.masks,
            solver=found.solver,
            objective=objective,
            bound=bound,
            gap=problem.relative_gap(objective, bound) if candidates.held else found.gap,
            rounding=rounding,
        )

    def _raw_consistency(self, problem: SelectionProblem) -> float:
        options = self.options
        if options.consistency_scale == "raw":
            return options.consistency
        return scale_consistency(
            problem.values, problem.costs, problem.budgets, options.consistency, problem.depth_costs
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
