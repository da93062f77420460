"""The proposed method: layers chosen for all clients at once by the integer program (P1)."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from layerfed.records import Choice
from layerfed.selection import (
    SelectionProblem,
    limit_weights,
    round_costs,
    scale_consistency,
    solve,
)
from layerfed.strategies.base import Candidates, SelectiveStrategy

logger = logging.getLogger(__name__)

Solver = Literal["auto", "lagrangian", "milp"]


class ILP(SelectiveStrategy):
    """Each round solves (P1): the largest gradient norms within every budget, chosen consistently.

    max Σ_i Σ_l m_i(l) ‖g_{i,l}‖² − λ Σ_{i<j} ‖m_i − m_j‖₁   s.t.   Σ_l c_l m_i(l) ≤ R_i   [S, (P1)]

    Norms are what clients claim. One whose gains are a thousand times the median client's is scaled
    down to that, and a warning says so: next to it, theirs would be rounding errors (`limit_weights`).

    Parameters
    ----------
    layers : LayerMap
    consistency : float (default: 0.1)
        λ. 0 leaves each client its own best layers, larger values pull choices together, negative ones
        push them apart.
    consistency_scale : {"relative", "raw"} (default: "relative")
        Whether λ is in units of the mean selected gain per client (so that one value suits models and
        tasks of any gradient scale, and no client's claims decide it: `scale_consistency`) or of the
        squared norms themselves, as in the paper.
    solver : {"auto", "lagrangian", "milp"} (default: "auto")
    solver_seconds : float (default: 10.0)
        Time limit a round. A gap left at the limit is logged and recorded, never hidden.
    solver_gap : float (default: 1e-6)
        Relative gap at which a solution counts as optimal.
    solver_rounding : float (default: 0.02)
        Largest share of a budget that rounding may take where costs are measured on devices and
        stand on no grid (`round_costs`); 0 keeps them exact, which is slow from 13 layers on.
        Objective, bound and gap are those of the rounded costs, which never spend more.
    **kwargs
        Those of `SelectiveStrategy`.
    """

    name = "ilp"
    statistics = ("grad_norm_sq",)

    def __init__(
        self,
        layers: Any,
        *,
        consistency: float = 0.1,
        consistency_scale: Literal["relative", "raw"] = "relative",
        solver: Solver = "auto",
        solver_seconds: float = 10.0,
        solver_gap: float = 1e-6,
        solver_rounding: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.consistency = consistency
        self.consistency_scale = consistency_scale
        self.solver: Solver = solver
        self.solver_seconds = solver_seconds
        self.solver_gap = solver_gap
        self.solver_rounding = solver_rounding
        super().__init__(layers, **kwargs)

    def select(self, candidates: Candidates) -> Choice:
        """Solve (P1) on this round's squared gradient norms."""
        values = candidates.statistics["grad_norm_sq"]
        problem = SelectionProblem(
            values, candidates.costs, candidates.budgets, 0.0, candidates.depth_costs
        )
        problem, rounding = round_costs(problem, self.solver_rounding)
        problem, weights = limit_weights(problem)
        for client in np.flatnonzero(weights < 1.0):
            logger.warning(
                "the client of partition %d claims gains %.1e times the largest that counts; they "
                "are scaled down",
                candidates.clients[int(client)],
                1.0 / weights[client],
            )
        found = solve(
            replace(problem, consistency=self._raw_consistency(problem)),
            solver=self.solver,
            time_limit=self.solver_seconds,
            gap=self.solver_gap,
        )
        return Choice(
            masks=found.masks,
            solver=found.solver,
            objective=found.objective,
            bound=found.bound,
            gap=found.gap,
            rounding=rounding,
        )

    def _raw_consistency(self, problem: SelectionProblem) -> float:
        if self.consistency_scale == "raw":
            return self.consistency
        return scale_consistency(
            problem.values, problem.costs, problem.budgets, self.consistency, problem.depth_costs
        )
