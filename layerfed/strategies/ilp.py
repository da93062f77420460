"""The proposed method: layers chosen for all clients at once by the integer program (P1)."""

from __future__ import annotations

from typing import Any, Literal

from layerfed.records import Choice
from layerfed.selection import SelectionProblem, scale_consistency, solve
from layerfed.strategies.base import Candidates, SelectiveStrategy

Solver = Literal["auto", "lagrangian", "milp"]


class ILP(SelectiveStrategy):
    """Each round solves (P1): the largest gradient norms within every budget, chosen consistently.

    max Σ_i Σ_l m_i(l) ‖g_{i,l}‖² − λ Σ_{i<j} ‖m_i − m_j‖₁   s.t.   Σ_l c_l m_i(l) ≤ R_i   [S, (P1)]

    Parameters
    ----------
    layers : LayerMap
    consistency : float (default: 0.1)
        λ. 0 leaves each client its own best layers, larger values pull choices together, negative ones
        push them apart.
    consistency_scale : {"relative", "raw"} (default: "relative")
        Whether λ is in units of the mean selected gain per client (so that one value suits models and
        tasks of any gradient scale) or of the squared norms themselves, as in the paper.
    solver : {"auto", "lagrangian", "milp"} (default: "auto")
    solver_seconds : float (default: 10.0)
        Time limit a round. A gap left at the limit is logged and recorded, never hidden.
    solver_gap : float (default: 1e-6)
        Relative gap at which a solution counts as optimal.
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
        **kwargs: Any,
    ) -> None:
        self.consistency = consistency
        self.consistency_scale = consistency_scale
        self.solver: Solver = solver
        self.solver_seconds = solver_seconds
        self.solver_gap = solver_gap
        super().__init__(layers, **kwargs)

    def select(self, candidates: Candidates) -> Choice:
        """Solve (P1) on this round's squared gradient norms."""
        values = candidates.statistics["grad_norm_sq"]
        consistency = self.consistency
        if self.consistency_scale == "relative":
            consistency = scale_consistency(
                values,
                candidates.costs,
                candidates.budgets,
                self.consistency,
                candidates.depth_costs,
            )
        problem = SelectionProblem(
            values, candidates.costs, candidates.budgets, consistency, candidates.depth_costs
        )
        found = solve(
            problem, solver=self.solver, time_limit=self.solver_seconds, gap=self.solver_gap
        )
        return Choice(
            masks=found.masks,
            solver=found.solver,
            objective=found.objective,
            bound=found.bound,
            gap=found.gap,
        )
