"""Ways to solve (P1) that `benchmarks/selection.py` compares: ours, PuLP's and cvxpy's."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from itertools import combinations
from typing import Any

import numpy as np
import pulp

from layerfed.selection import SelectionError, SelectionProblem, solve, solve_milp

#: Largest n * n * L / 2 for which the pairwise form is written down at all.
MOST_PAIRS = 300_000

#: ECOS_BB cannot be stopped by time, so the cvxpy form stays at the paper's size.
MOST_PAIRS_CVXPY = 3_000


@dataclass(frozen=True)
class Answer:
    """What a solver says about one instance."""

    objective: float | None
    seconds: float
    gap: float | None = None
    limited: bool = False


def ours(problem: SelectionProblem, limit: float) -> Answer:
    selection = solve(problem, time_limit=limit)
    return Answer(selection.objective, selection.seconds, selection.gap)


def count_form(problem: SelectionProblem, limit: float) -> Answer:
    started = time.perf_counter()
    try:
        selection = solve_milp(problem, time_limit=limit, backend="highs")
    except SelectionError:  # no masks in time
        return Answer(None, time.perf_counter() - started, limited=True)
    return Answer(
        selection.objective, selection.seconds, selection.gap, limited=selection.gap > 1e-6
    )


def pairwise(backend: str) -> Callable[[SelectionProblem, float], Answer]:
    """PuLP on (P1) as the paper writes it: a variable for each pair's dissent on each layer."""

    def run(problem: SelectionProblem, limit: float) -> Answer:
        started = time.perf_counter()
        program = pulp.LpProblem("pairwise", pulp.LpMaximize)
        clients, layers = range(problem.clients), range(problem.layers)
        m = [[program.add_variable(f"m_{i}_{j}", cat="Binary") for j in layers] for i in clients]
        terms = [(m[i][j], float(problem.values[i, j])) for i in clients for j in layers]
        for a, b in combinations(clients, 2):
            for j in layers:
                dissent = program.add_variable(f"d_{a}_{b}_{j}", 0, 1)
                program += dissent - m[a][j] + m[b][j] >= 0
                program += dissent - m[b][j] + m[a][j] >= 0
                terms.append((dissent, -problem.consistency))
        for i in clients:
            spent = [(m[i][j], float(problem.cost_matrix[i, j])) for j in layers]
            program += pulp.LpAffineExpression(spent) <= float(problem.limits[i])
        program.setObjective(pulp.LpAffineExpression(terms))
        maker = pulp.PULP_CBC_CMD if backend == "cbc" else pulp.HiGHS
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program.solve(maker(msg=False, timeLimit=limit, gapRel=1e-6, threads=1))
        proven = program.sol_status == pulp.constants.LpSolutionOptimal
        masks = np.array([[(x.varValue or 0.0) > 0.5 for x in row] for row in m])
        objective = problem.objective(masks) if problem.feasible(masks) else None
        return Answer(objective, time.perf_counter() - started, limited=not proven)

    return run


def cvxpy_form(squares: bool) -> Callable[[SelectionProblem, float], Answer]:
    """(P1) in cvxpy with ECOS_BB, which takes no time limit; no usable masks, no objective."""

    def run(problem: SelectionProblem, _limit: float) -> Answer:
        cp: Any = import_module("cvxpy")
        started = time.perf_counter()
        m = cp.Variable(problem.values.shape, boolean=True)
        pairs = list(combinations(range(problem.clients), 2))
        if squares:
            layers = range(problem.layers)
            dissent = cp.sum([cp.square(m[a, j] - m[b, j]) for a, b in pairs for j in layers])
        else:
            dissent = cp.sum([cp.norm1(m[a] - m[b]) for a, b in pairs])
        gain = cp.sum(cp.multiply(problem.values, m))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cvxpy advises against so many scalar terms
            program = cp.Problem(
                cp.Maximize(gain - problem.consistency * dissent),
                [m @ problem.costs <= problem.budgets],
            )
            try:
                program.solve(solver="ECOS_BB")
            except cp.SolverError:
                return Answer(None, time.perf_counter() - started)
        masks = None if m.value is None else np.asarray(m.value) > 0.5
        usable = masks is not None and problem.feasible(masks)
        objective = problem.objective(masks) if masks is not None and usable else None
        return Answer(objective, time.perf_counter() - started)

    return run


def cvxpy_present() -> bool:
    """Whether the cvxpy peers can run here."""
    try:
        cp: Any = import_module("cvxpy")
    except ImportError:
        return False
    return "ECOS_BB" in cp.installed_solvers()


def peers_for(n: int, layers: int, with_cvxpy: bool) -> dict[str, Callable[..., Answer]]:
    peers: dict[str, Callable[..., Answer]] = {"pulp count highs": count_form}
    pairs = n * n * layers // 2
    if pairs <= MOST_PAIRS:
        peers |= {"pulp pairwise cbc": pairwise("cbc"), "pulp pairwise highs": pairwise("highs")}
    if pairs <= MOST_PAIRS_CVXPY and with_cvxpy:
        peers |= {"cvxpy squares": cvxpy_form(True), "cvxpy 1-norm": cvxpy_form(False)}
    return peers
