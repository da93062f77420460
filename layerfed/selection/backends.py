"""HiGHS and CBC behind PuLP: one call that solves, checks the status and reads the bound."""

from __future__ import annotations

import re
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pulp

from layerfed.selection.count_model import CountModel
from layerfed.selection.problem import SelectionError

Backend = Literal["auto", "highs", "cbc"]

#: Tolerance on rows, bounds and integrality; rows are scaled to a right-hand side of about 1.
#: Below 1e-7 HiGHS 1.15's presolve has declared wrong solutions optimal.
FEASIBILITY = 1e-7


def pick_backend(backend: Backend) -> str:
    """Name of an installed backend; raises SelectionError if there is none."""
    installed = {"highs": "HiGHS", "cbc": "PULP_CBC_CMD"}
    if backend not in ("auto", *installed):
        raise ValueError(f"backend is {backend!r}; expected 'auto', 'highs' or 'cbc'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PuLP announces that it will move CBC to an extra
        present = set(pulp.listSolvers(onlyAvailable=True))
    for name in ("highs", "cbc") if backend == "auto" else (backend,):
        if installed[name] in present:
            return name
    raise SelectionError(
        f"the MILP backend {backend!r} is not installed: `pip install highspy`, or use a PuLP "
        "that bundles CBC"
    )


def run_backend(
    name: str,
    model: CountModel,
    deadline: float,
    gap: float,
    *,
    warm: bool = False,
    proven: bool = False,
) -> tuple[bool, float]:
    """Solve `model` in place.

    Parameters
    ----------
    name : str
        From `pick_backend`.
    model : CountModel
        Its variables carry the solution afterwards.
    deadline : float
        ``time.perf_counter()`` value at which the backend stops; handing the model over counts.
    gap : float
        Relative gap at which the backend may stop.
    warm : bool
        Start from the variables' initial values.
    proven : bool
        Accept nothing but a proved optimum, and skip presolve: on programs that hold the
        objective at its optimum, HiGHS 1.15's has declared wrong solutions optimal.

    Returns
    -------
    found : bool
        Whether the variables carry a solution.
    bound : float
        Upper bound on (P1)'s objective; infinite where the backend stated none.

    Raises
    ------
    SelectionError
        If the backend failed or its status cannot be true.
    """
    run = _run_highs if name == "highs" else _run_cbc
    bound = run(model, deadline, gap, warm, not proven)
    program = model.program
    if program.status in (pulp.constants.LpStatusInfeasible, pulp.constants.LpStatusUnbounded):
        raise SelectionError(
            f"{name} calls the selection {pulp.LpStatus[program.status]}, which it cannot be: "
            "selecting nothing is always possible; check the magnitudes of values and costs, or "
            "try the other backend"
        )
    accepted = {pulp.constants.LpSolutionOptimal}
    if not proven:
        accepted.add(pulp.constants.LpSolutionIntegerFeasible)
    return program.sol_status in accepted, bound


class _PunctualHiGHS(pulp.HiGHS):  # type: ignore[misc]
    """PuLP's HiGHS, stopped by a deadline and started from the variables' initial values."""

    def __init__(self, deadline: float, warm: bool, **options: Any) -> None:
        super().__init__(msg=False, threads=1, **options)
        self._deadline = deadline
        self._warm = warm

    def actualSolve(self, lp: Any) -> Any:  # noqa: N802 (PuLP's name)
        """Note when the model's hand-over begins."""
        self._began = time.perf_counter()
        return super().actualSolve(lp)

    def callSolver(self, lp: Any) -> None:  # noqa: N802 (PuLP's name)
        """Hand over the initial values and the time that is left, then solve."""
        import highspy

        if self._warm:
            start = highspy.HighsSolution()
            start.col_value = [float(variable.varValue or 0.0) for variable in lp.variables()]
            lp.solverModel.setSolution(start)
        now = time.perf_counter()
        # Reading the answer takes about as long as handing the model over.
        left = self._deadline - now - (now - self._began)
        lp.solverModel.setOptionValue("time_limit", max(left, 0.01))
        super().callSolver(lp)


def _run_highs(model: CountModel, deadline: float, gap: float, warm: bool, presolve: bool) -> float:
    """Solve with HiGHS; returns its upper bound."""
    solver = _PunctualHiGHS(
        deadline,
        warm,
        gapRel=gap,
        gapAbs=0.0,
        presolve="choose" if presolve else "off",
        mip_feasibility_tolerance=FEASIBILITY,
        primal_feasibility_tolerance=FEASIBILITY,
    )
    model.program.solve(solver)
    return model.unscaled(float(model.program.solverModel.getInfo().mip_dual_bound))


def _run_cbc(model: CountModel, deadline: float, gap: float, warm: bool, presolve: bool) -> float:
    """Solve with CBC; returns the upper bound from its log."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PuLP announces that it will move CBC to an extra
        log = Path(folder) / "cbc.log"
        solver = pulp.PULP_CBC_CMD(
            msg=False,
            gapRel=gap,
            gapAbs=0.0,
            threads=1,
            timeLimit=max(deadline - time.perf_counter(), 0.01),
            presolve=presolve,
            warmStart=warm,
            logPath=str(log),
        )
        try:
            model.program.solve(solver)
        except pulp.PulpSolverError as error:
            raise SelectionError(f"CBC failed: {error}; try the backend 'highs'") from error
        stated = re.findall(r"Lower bound:\s+(\S+)|best possible (\S+?)\)", log.read_text())
    if stated:
        return model.unscaled(float(stated[-1][0] or stated[-1][1]))
    if model.program.sol_status == pulp.constants.LpSolutionOptimal:
        # CBC proves optimality up to `gap` and then does not print its bound.
        best = float(pulp.value(model.program.objective))
        return model.unscaled(best - gap * abs(best))
    return np.inf
