"""How often selection is proved optimal, by kind of gains, costs, budgets and λ, and by size.

    OMP_NUM_THREADS=1 python benchmarks/selection_sweep.py --size 1000x80 --count 150 --time-limit 5
    OMP_NUM_THREADS=1 python benchmarks/selection_sweep.py --costs measured --size 100x32 --count 40
    OMP_NUM_THREADS=1 python benchmarks/selection_sweep.py --table --json table.json
    OMP_NUM_THREADS=1 python benchmarks/selection_sweep.py --table --without branching

Kinds of gains: independent log-normal; with a factor for each layer, for each client, or for each of
five groups of clients; uniform; Pareto (1.5); and `ties`, whole numbers 0..5, of which many are equal.
Budgets: 1, 2, 4 or 8 layers for all, a half-normal on 1..4, or anything up to half of the model.
Relative λ from 0.01 to 10.

Kinds of costs: `unit`; `integer`, whole numbers 1..50 for each layer; and `measured`, seconds with 5%
noise by client and layer on devices of different speed. Every second `measured` instance has depth costs
too (with `depth` all have), and they are rounded as in the `ilp` strategy (2% of a budget).

--table takes the sizes and costs of `TABLE` in turn. --without switches one mechanism of the solver off,
to show its effect. --cpu-clock counts this thread's CPU seconds, also for limits, since on a busy
machine wall clock measures the other work too.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import layerfed.selection as package
from layerfed.selection import (
    SelectionProblem,
    bound,
    knapsack,
    lagrangian,
    mean_gain,
    preparing,
    round_costs,
    solve,
)

KINDS = ["iid", "layer", "client", "groups", "uniform", "heavy", "ties"]
BUDGETS = ["1", "2", "4", "8", "half-normal", "wide"]
LAMBDAS = [0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 3.0, 10.0]


class Costs(StrEnum):
    """The kinds of costs."""

    UNIT = "unit"
    INTEGER = "integer"
    MEASURED = "measured"
    DEPTH = "depth"


#: Clients, layers, costs and number of instances of the table.
TABLE = [
    (20, 12, Costs.UNIT, 40),
    (100, 32, Costs.UNIT, 30),
    (1000, 80, Costs.UNIT, 12),
    (20, 12, Costs.INTEGER, 30),
    (100, 32, Costs.INTEGER, 10),
    (1000, 80, Costs.INTEGER, 4),
    (20, 32, Costs.DEPTH, 12),
]


@dataclass(frozen=True)
class Result:
    """The result on one instance."""

    clients: int
    layers: int
    costs: str
    kind: str
    budgets: str
    consistency: float
    seconds: float
    gap: float
    objective: float
    solver: str


def gains(rng: np.random.Generator, kind: str, n: int, layers: int) -> np.ndarray:
    shape = (n, layers)
    if kind == "iid":
        return rng.lognormal(size=shape)
    if kind == "layer":
        return rng.lognormal(size=(1, layers)) * rng.lognormal(sigma=0.7, size=shape)
    if kind == "client":
        return rng.lognormal(size=(n, 1)) * rng.lognormal(sigma=0.7, size=shape)
    if kind == "groups":
        group = rng.integers(0, 5, size=n)
        return rng.lognormal(size=(5, layers))[group] * rng.lognormal(sigma=0.3, size=shape)
    if kind == "uniform":
        return rng.uniform(size=shape)
    if kind == "heavy":
        return rng.pareto(1.5, size=shape)
    return rng.integers(0, 6, size=shape).astype(float)


def rooms(rng: np.random.Generator, budgets: str, n: int, layers: int) -> np.ndarray:
    if budgets == "half-normal":
        return np.clip(np.round(1.0 + np.abs(rng.normal(scale=1.5, size=n))), 1.0, 4.0)
    if budgets == "wide":
        return rng.integers(1, layers // 2 + 1, size=n).astype(float)
    return np.full(n, float(budgets))


def additive(
    rng: np.random.Generator, n: int, layers: int, count: int, largest_cost: int
) -> Iterator[tuple[SelectionProblem, str, str, float]]:
    """Yield instances with whole costs 1..`largest_cost`: every combination, in a random order."""
    combinations = list(itertools.product(KINDS, BUDGETS, LAMBDAS))
    rng.shuffle(combinations)
    for kind, budgets, relative in itertools.islice(itertools.cycle(combinations), count):
        values = gains(rng, str(kind), n, layers)
        room, costs = rooms(rng, str(budgets), n, layers), np.ones(layers)
        if largest_cost > 1:
            costs = rng.integers(1, largest_cost + 1, size=layers).astype(float)
            room *= (1 + largest_cost) / 2
        problem = SelectionProblem(values, costs, room, 0.0)
        problem = replace(problem, consistency=float(relative) * mean_gain(problem) / n)
        yield problem, str(kind), str(budgets), float(relative)


def measured(
    rng: np.random.Generator, n: int, layers: int, count: int, always_depth: bool
) -> Iterator[tuple[SelectionProblem, str, str, float]]:
    """Yield instances with noisy seconds as costs, and depth costs in half of them or in all."""
    for index in range(count):
        values = gains(rng, "layer", n, layers)
        speed = rng.lognormal(sigma=0.3, size=(n, 1))
        costs = speed * (1 + 0.05 * rng.standard_normal((n, layers)))
        room, depth = rooms(rng, "half-normal", n, layers), None
        if always_depth or index % 2:
            depth = 0.5 * speed * np.arange(layers)[::-1]
            room = 4.0 * room
        relative = (0.1, 0.5)[index // 2 % 2]
        problem, _ = round_costs(SelectionProblem(values, costs, room, 0.0, depth), 0.02)
        raw = relative * mean_gain(problem) / n
        kind = "measured" if depth is None else "measured, with depth"
        yield replace(problem, consistency=raw), kind, "half-normal", relative


def instances(
    costs: Costs, seed: int, n: int, layers: int, count: int
) -> Iterator[tuple[SelectionProblem, str, str, float]]:
    rng = np.random.default_rng(seed)
    if costs in (Costs.UNIT, Costs.INTEGER):
        return additive(rng, n, layers, count, 50 if costs == Costs.INTEGER else 1)
    return measured(rng, n, layers, count, costs == Costs.DEPTH)


# ------------------------------------------------------------------------- mechanisms, switched off
class Mechanism(StrEnum):
    """The mechanisms that --without can switch off."""

    NOTHING = "nothing"
    BRANCHING = "branching"
    MULTIPLIERS = "multipliers"
    DEFLECTION = "deflection"
    ENUMERATION = "enumeration"
    MILP = "milp"
    TIES = "ties"


def switch_off(mechanism: Mechanism) -> None:
    """Switch one mechanism of the solver off for the rest of this process."""
    if mechanism == Mechanism.BRANCHING:
        lagrangian.branch = lambda problem, oracle, search, parts: parts
    elif mechanism == Mechanism.MULTIPLIERS:
        bound._relax_budgets = lambda problem, room, slopes, penalties: bound._relax_copies(
            problem, knapsack.ClientOracle(problem), slopes, penalties
        )
    elif mechanism == Mechanism.DEFLECTION:
        bound.DEFLECTION = 0.0
    elif mechanism == Mechanism.ENUMERATION:
        knapsack.ENUMERATION_LAYERS = preparing.ENUMERATION_LAYERS = 0
    elif mechanism == Mechanism.MILP:
        package.MOST_PICKS = -1
    elif mechanism == Mechanism.TIES:
        package.break_ties = lambda problem, masks, oracle: masks


def solved(
    costs: Costs, seed: int, n: int, layers: int, count: int, limit: float
) -> Iterator[Result]:
    for problem, kind, budgets, relative in instances(costs, seed, n, layers, count):
        started = time.perf_counter()
        found = solve(problem, time_limit=limit)
        seconds = time.perf_counter() - started
        yield Result(
            *(n, layers, str(costs), kind, budgets, relative),
            *(seconds, found.gap, found.objective, found.solver),
        )


def summary(results: list[Result]) -> None:
    """Print one line for each kind, and every instance that was not proved in 3 seconds."""
    for kind in sorted({result.kind for result in results}):
        group = [result for result in results if result.kind == kind]
        seconds = [result.seconds for result in group]
        proved = [result for result in group if result.gap <= 1e-6]
        fast = sum(result.seconds < 3 for result in proved)
        print(
            f"{kind:22} {len(group):4} instances: {len(proved)} proved (gap ≤ 1e-6), {fast} of them in "
            f"3 s; largest gap {max(result.gap for result in group):.1e}; seconds: median "
            f"{np.median(seconds):.4f}, 90% {np.quantile(seconds, 0.9):.3f}, max {max(seconds):.2f}"
        )
    for result in results:
        if result.gap > 1e-6 or result.seconds >= 3:
            print("  ", result)


def cell(results: list[Result]) -> str:
    """Return one cell of the table: proved of all, largest gap, median and mean seconds."""
    proved = sum(result.gap <= 1e-6 for result in results)
    seconds = [result.seconds for result in results]
    return (
        f"{proved}/{len(results)}, {max(result.gap for result in results):.0e}, "
        f"{np.median(seconds):.2g} s ({np.mean(seconds):.2g})"
    )


def main(
    size: Annotated[str, typer.Option(help="Clients x layers.")] = "100x32",
    costs: Annotated[Costs, typer.Option(help="What a layer costs.")] = Costs.UNIT,
    count: Annotated[int, typer.Option(help="Instances.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of all instances.")] = 0,
    time_limit: Annotated[float, typer.Option(help="Seconds an instance.")] = 10.0,
    table: Annotated[bool, typer.Option(help="All sizes and costs of the table.")] = False,
    without: Annotated[Mechanism, typer.Option(help="Switch this off.")] = Mechanism.NOTHING,
    cpu_clock: Annotated[bool, typer.Option(help="Count CPU seconds.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all rows here.")] = None,
) -> None:
    """Solve the instances one by one, and print the results."""
    logging.getLogger("layerfed").setLevel(logging.ERROR)
    switch_off(without)
    if cpu_clock:
        time.perf_counter = time.process_time
    n, layers = (int(number) for number in size.split("x"))
    results: list[Result] = []
    for row in TABLE if table else [(n, layers, costs, count)]:
        found = list(solved(row[2], seed, row[0], row[1], row[3], time_limit))
        if table:
            print(f"{row[0]} x {row[1]} {row[2]:8} {cell(found)}", flush=True)
        else:
            summary(found)
        results += found
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
