"""The solvers of (P1) that `benchmarks/selection.py` compares: LayerFed's, PuLP's and cvxpy's.

Each peer runs in a child process with bounds on wall clock and memory, since CBC checks its time limit
only every few minutes, ECOS_BB has none, and models of pairs outgrow any memory. The result says if a
bound ended it. The child is this file, with the instance on stdin and the answer on stdout:

    python benchmarks/selection_peers.py "pulp count highs" 20 < instance.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pulp

from layerfed.selection import SelectionError, SelectionProblem, solve, solve_milp
from layerfed.selection.milp import weighted_sum

#: Largest address space of a peer in bytes, with its own child processes.
MEMORY = 6 * 2**30

#: Largest number of variables of a model; PuLP takes about a kilobyte for each.
MOST_VARIABLES = 3_000_000

#: Seconds added to the limit, for starting Python, building the model and reading the answer.
GRACE = 5.0


@dataclass(frozen=True)
class Answer:
    """A solver's answer on one instance; `note` says what ended it early, if anything did."""

    objective: float | None
    seconds: float
    gap: float | None = None
    limited: bool = False
    note: str = ""


Peer = Callable[[SelectionProblem, float], Answer]

#: PuLP's names of the solvers; PuLP 4 has CBC only with `pip install pulp[cbc]`, under another name.
SOLVERS = {
    "cbc": "PULP_CBC_CMD" if hasattr(pulp, "PULP_CBC_CMD") else "COIN_CMD",
    "highs": "HiGHS",
}


def ours(problem: SelectionProblem, limit: float) -> Answer:
    selection = solve(problem, time_limit=limit)
    return Answer(selection.objective, selection.seconds, selection.gap)


def count_form(problem: SelectionProblem, limit: float) -> Answer:
    started = time.perf_counter()
    try:
        selection = solve_milp(problem, time_limit=limit)
    except SelectionError as error:
        elapsed = time.perf_counter() - started
        # The time in which a solver gives up on a large model does not count.
        return Answer(None, elapsed if elapsed > limit / 2 else 0.0, limited=True, note=str(error))
    return Answer(
        selection.objective, selection.seconds, selection.gap, limited=selection.gap > 1e-6
    )


def pairwise(backend: str) -> Peer:
    """Solve (P1) with PuLP in the paper's form: a variable for each pair's dissent on each layer."""

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
            program += weighted_sum(spent) <= float(problem.limits[i])
        program.setObjective(weighted_sum(terms))
        left = max(limit - (time.perf_counter() - started), 0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            maker = pulp.getSolver(SOLVERS[backend], msg=False, timeLimit=left, gapRel=1e-6)
            outcome = program.solve(maker)
        # PuLP 4 returns how it went, PuLP 3 notes it on the program.
        proven = getattr(program, "sol_status", getattr(outcome, "status", None)) == 1
        masks = np.array([[(x.varValue or 0.0) > 0.5 for x in row] for row in m])
        objective = problem.objective(masks) if problem.feasible(masks) else None
        return Answer(objective, time.perf_counter() - started, limited=not proven)

    return run


def cvxpy_form(squares: bool) -> Peer:
    """Solve (P1) with cvxpy and ECOS_BB, which has no time limit; without usable masks, no objective."""

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
            except cp.SolverError as error:
                return Answer(None, time.perf_counter() - started, note=f"failed: {error}")
        masks = None if m.value is None else np.asarray(m.value) > 0.5
        usable = masks is not None and problem.feasible(masks)
        objective = problem.objective(masks) if masks is not None and usable else None
        return Answer(objective, time.perf_counter() - started)

    return run


PEERS: dict[str, Peer] = {
    "pulp count highs": count_form,
    "pulp pairwise cbc": pairwise("cbc"),
    "pulp pairwise highs": pairwise("highs"),
    "cvxpy squares": cvxpy_form(squares=True),
    "cvxpy 1-norm": cvxpy_form(squares=False),
}


def present_peers() -> list[str]:
    """Return the names of the peers that can run here."""
    with_cvxpy = find_spec("cvxpy") is not None and find_spec("ecos") is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PuLP 3 announces that it will move CBC to an extra
        with_cbc = SOLVERS["cbc"] in pulp.listSolvers(onlyAvailable=True)
    here = {"cvxpy": with_cvxpy, "cbc": with_cbc}
    return [name for name in PEERS if all(here[part] for part in name.split() if part in here)]


def bounded(name: str, problem: SelectionProblem, limit: float) -> Answer:
    """Run a peer in a process of its own for at most `limit` + `GRACE` seconds."""
    n, layers = problem.values.shape
    variables = n * layers + (0 if name == "pulp count highs" else n * (n - 1) // 2 * layers)
    if variables > MOST_VARIABLES:
        note = f"model too large: {variables:,} variables"
        return Answer(None, 0.0, limited=True, note=note)
    instance = {
        "values": problem.values.tolist(),
        "costs": problem.costs.tolist(),
        "budgets": problem.budgets.tolist(),
        "consistency": problem.consistency,
    }
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), name, str(limit)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # so that a solver it started ends with it
    )
    try:
        output, _ = child.communicate(json.dumps(instance), timeout=limit + GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        seconds = time.perf_counter() - started
        return Answer(None, seconds, limited=True, note=f"over {limit:g} s, ended")
    seconds = time.perf_counter() - started
    if child.returncode != 0 or not output:
        return Answer(None, seconds, limited=True, note=f"ended by itself ({child.returncode})")
    return Answer(**json.loads(output.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Solve the instance on standard input.")
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("limit", type=float, help="seconds")
    parser.add_argument("--json", type=Path, help="write the answer there, not to standard output")
    arguments = parser.parse_args()
    answer = json.dumps(asdict(_within_memory(arguments.peer, arguments.limit)))
    if arguments.json:
        arguments.json.write_text(answer + "\n", encoding="utf-8")
    else:
        print(answer)


def _within_memory(name: str, limit: float) -> Answer:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    problem = SelectionProblem.from_json(json.load(sys.stdin))
    started = time.perf_counter()
    try:
        return PEERS[name](problem, limit)
    except MemoryError:
        seconds = time.perf_counter() - started
        note = f"more than {MEMORY / 2**30:g} GiB of memory"
        return Answer(None, seconds, limited=True, note=note)


if __name__ == "__main__":
    main()
