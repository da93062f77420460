"""Time and quality of layer selection, against other ways to solve (P1).

    python benchmarks/selection.py --plot selection.png --json selection.json
    python benchmarks/selection.py --part compare --time-limit 20
    python benchmarks/selection.py --quick

All get the same instances and one thread (set OMP_NUM_THREADS=1):

- LayerFed's solver;
- PuLP on the pairwise form of the paper (CBC and HiGHS), and on the count form (HiGHS);
- cvxpy with ECOS_BB on the pairwise form, with squared differences of scalar variables (as in the
  paper's released code), and with the 1-norm, which cvxpy handles much better. These two need
  `pip install cvxpy ecos`; without it they are skipped with a note.

Each peer runs in a process of its own, which is ended after --time-limit seconds (plus 5 s for its
start). So `compare` takes at most 18 instances x 5 peers x that time: about a quarter of an hour at
20 s. A peer that was ended, ran out of memory or would need millions of variables is reported as such.
It counts with the time it took, so its ratio is a lower bound (marked ≥).

Values are log-normal, with one factor for each layer and one for each client and layer. Budgets are the
same for all clients, or a half-normal on 1..4. λ is scale-free.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from selection_peers import PEERS, Answer, bounded, ours, pairwise, present_peers

from layerfed.selection import SelectionProblem, mean_gain

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SIZES = [(20, 12), (100, 32), (1000, 80)]
BUDGETS = ["identical", "heterogeneous"]
DEPTHS = [12, 32, 80]

console = Console(width=140)


class Part(StrEnum):
    """The parts of the benchmark."""

    RANDOM = "random"
    COSTS = "costs"
    COMPARE = "compare"
    SCALING = "scaling"


@dataclass(frozen=True)
class Row:
    """One solver on one instance, or on a group of `count` instances."""

    part: str
    solver: str
    clients: int | None = None
    layers: int | None = None
    budgets: str = "mixed"
    consistency: float | None = None
    seconds: float = 0.0
    objective: float | None = None
    gap: float | None = None
    limited: bool = False
    ratio: float | None = None
    objective_difference: float | None = None
    count: int = 1
    note: str = ""


def instance(
    rng: np.random.Generator,
    n: int,
    layers: int,
    budgets: str,
    relative: float,
    *,
    largest_cost: int = 1,
) -> SelectionProblem:
    """Draw one round. Costs are whole numbers in 1..`largest_cost`, and budgets scale with them."""
    values = rng.lognormal(size=(1, layers)) * rng.lognormal(sigma=0.7, size=(n, layers))
    if budgets == "identical":
        room = np.full(n, float(rng.integers(1, 5)))
    else:
        room = np.clip(np.round(1.0 + np.abs(rng.normal(scale=1.5, size=n))), 1.0, 4.0)
    costs = rng.integers(1, largest_cost + 1, size=layers).astype(float)
    room *= (1 + largest_cost) / 2
    problem = SelectionProblem(values, costs, room, 0.0)
    return replace(problem, consistency=relative * mean_gain(problem) / n)


def random_instances(rng: np.random.Generator, count: int, sample: int, limit: float) -> list[Row]:
    """Check certificates and agreement with MILP: unit costs, n and L up to 40, λ from 0.01 to 10."""
    answers: list[Answer] = []
    worst_difference, proved, milp_seconds = 0.0, 0, []
    for index in range(count):
        n, layers = (int(size) for size in rng.integers(1, 41, size=2))
        problem = instance(rng, n, layers, BUDGETS[index % 2], float(10 ** rng.uniform(-2.0, 1.0)))
        answers.append(ours(problem, limit))
        if index < sample:
            peer = pairwise("highs")(problem, limit)
            milp_seconds.append(peer.seconds)
            difference = _difference(answers[-1], peer)
            if not peer.limited and difference is not None:
                proved += 1
                worst_difference = max(worst_difference, abs(difference))
    seconds = [answer.seconds for answer in answers]
    gaps = [answer.gap or 0.0 for answer in answers]
    console.print(
        f"[bold]{count} random instances[/] (n, L ≤ 40, unit costs, λ 0.01..10): gap ≤ 1e-6 on "
        f"{sum(gap <= 1e-6 for gap in gaps)}, largest gap {max(gaps):.1e}; median "
        f"{1e3 * statistics.median(seconds):.2f} ms, 99% {1e3 * np.quantile(seconds, 0.99):.1f} "
        f"ms, max {1e3 * max(seconds):.0f} ms"
    )
    console.print(
        f"  agreement with PuLP pairwise (HiGHS): {proved} of {sample} proved within {limit:.0f} "
        f"s; largest relative difference of objectives {worst_difference:.1e}"
    )
    mine = Row("random", "ours", seconds=statistics.median(seconds), gap=max(gaps), count=count)
    if not proved:
        return [mine]
    peer_row = Row(
        "random",
        "pulp pairwise highs",
        seconds=statistics.median(milp_seconds),
        objective_difference=worst_difference,
        count=proved,
    )
    return [mine, peer_row]


def parameter_costs(rng: np.random.Generator, count: int, limit: float) -> list[Row]:
    """Check the knapsack case: whole costs 1..50 at n=20, L=12."""
    answers = [
        ours(
            instance(
                rng, 20, 12, BUDGETS[i % 2], float(10 ** rng.uniform(-1.5, 0.5)), largest_cost=50
            ),
            limit,
        )
        for i in range(count)
    ]
    seconds = [answer.seconds for answer in answers]
    gaps = [answer.gap or 0.0 for answer in answers]
    console.print(
        f"[bold]{count} instances with costs 1..50[/] (n=20, L=12, λ 0.03..3): gap ≤ 1e-4 on "
        f"{sum(gap <= 1e-4 for gap in gaps)}, largest gap {max(gaps):.1e}; median "
        f"{statistics.median(seconds):.3f} s, 90% {np.quantile(seconds, 0.9):.3f} s, max "
        f"{max(seconds):.2f} s"
    )
    median = statistics.median(seconds)
    return [Row("costs 1..50", "ours", 20, 12, seconds=median, gap=max(gaps), count=count)]


def compare(
    rng: np.random.Generator,
    sizes: list[tuple[int, int]],
    lambdas: list[float],
    limit: float,
    peers: list[str],
) -> Iterator[Row]:
    """Run LayerFed's solver and every peer on the same instances."""
    for n, layers in sizes:
        for budgets in BUDGETS:
            for relative in lambdas:
                problem = instance(rng, n, layers, budgets, relative)
                runs = [ours(problem, limit) for _ in range(3)]
                mine = sorted(runs, key=lambda answer: answer.seconds)[1]
                place = ("compare", n, layers, budgets, relative)
                yield _row(place, "ours", mine, mine)
                for name in peers:
                    yield _row(place, name, bounded(name, problem, limit), mine)


def _difference(mine: Answer, other: Answer) -> float | None:
    """Return by how much LayerFed's objective is better, relative to itself."""
    if mine.objective is None or other.objective is None:
        return None
    return (mine.objective - other.objective) / max(abs(mine.objective), 1e-300)


def _row(place: tuple[str, int, int, str, float], name: str, answer: Answer, mine: Answer) -> Row:
    part, n, layers, budgets, relative = place
    difference = _difference(mine, answer)
    row = Row(
        part,
        name,
        n,
        layers,
        budgets,
        relative,
        answer.seconds,
        answer.objective,
        answer.gap,
        answer.limited,
        answer.seconds / mine.seconds if answer.seconds else None,
        difference,
        note=answer.note,
    )
    shown = "no answer" if difference is None else f"ours better by {difference:+.1e}"
    stopped = " (stopped)" if answer.limited and not answer.note else ""
    console.print(
        f"  ({n}, {layers}) {budgets:13} λ={relative:<5g} {name:20} {answer.seconds:9.4f} s  "
        f"{shown}{stopped} {answer.note}",
        highlight=False,
    )
    return row


def scaling(
    rng: np.random.Generator, counts: list[int], limit: float, peers: list[str]
) -> Iterator[Row]:
    """Measure time over the number of clients: LayerFed at three depths, the peers at the first.

    A peer that reached its limit is not tried on more clients.
    """
    for layers in DEPTHS:
        for n in counts:
            problems = [instance(rng, n, layers, "heterogeneous", lam) for lam in (0.1, 0.5, 2.0)]
            yield _medians("ours", problems, [ours(problem, limit) for problem in problems])
            if layers != DEPTHS[0]:
                continue
            for name in list(peers):
                answer = bounded(name, problems[1], limit)
                if answer.limited:
                    peers = [peer for peer in peers if peer != name]
                if answer.seconds:
                    yield _medians(name, problems[1:2], [answer])


def _medians(name: str, problems: list[SelectionProblem], answers: list[Answer]) -> Row:
    seconds = statistics.median(answer.seconds for answer in answers)
    problem, limited = problems[0], any(answer.limited for answer in answers)
    console.print(
        f"  ({problem.clients}, {problem.layers}) {name:20} {seconds:9.4f} s {answers[-1].note}",
        highlight=False,
    )
    return Row(
        "scaling",
        name,
        problem.clients,
        problem.layers,
        "heterogeneous",
        seconds=seconds,
        gap=max((answer.gap or 0.0 for answer in answers), default=None),
        limited=limited,
        count=len(answers),
        note=answers[-1].note,
    )


def print_table(rows: list[Row]) -> None:
    table = Table(title="Medians over budgets and λ; ratio = peer's time / ours, same instance")
    for column in ("n", "L", "solver", "runs", "median s", "ratio: min", "median", "max"):
        table.add_column(column, justify="left" if column == "solver" else "right")
    table.add_column("ours better by: min", justify="right")
    table.add_column("max", justify="right")
    table.add_column("no answer", justify="right")
    groups: dict[tuple[int | None, int | None, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.clients, row.layers, row.solver), []).append(row)
    for (n, layers, solver), group in groups.items():
        tried = [row for row in group if row.ratio is not None]
        if not tried:
            table.add_row(str(n), str(layers), solver, str(len(group)), group[0].note)
            continue
        ratios = [row.ratio or 0.0 for row in tried]
        differences = [d for row in group if (d := row.objective_difference) is not None]
        bound = "≥ " if any(row.limited for row in group) else ""
        table.add_row(
            str(n),
            str(layers),
            solver,
            str(len(group)),
            f"{bound}{statistics.median(row.seconds for row in tried):.4f}",
            f"{bound}{min(ratios):,.1f}",
            f"{bound}{statistics.median(ratios):,.1f}",
            f"{bound}{max(ratios):,.1f}",
            f"{min(differences):+.1e}" if differences else "–",
            f"{max(differences):+.1e}" if differences else "–",
            str(len(group) - len(differences)),
        )
    console.print(table)


def draw(rows: list[Row], path: Path) -> None:
    """Draw time over clients, log-log; a cross marks a peer that a limit ended."""
    figure, axes = plt.subplots(figsize=(7.5, 4.8), constrained_layout=True)
    scaled = [row for row in rows if row.part == "scaling"]
    lines = sorted({(row.solver != "ours", row.solver, row.layers or 0) for row in scaled})
    for is_peer, solver, layers in lines:
        line = [row for row in scaled if (row.solver, row.layers) == (solver, layers)]
        clients = [row.clients or 0 for row in line]
        name = solver if is_peer else "LayerFed"
        (drawn,) = axes.plot(
            clients,
            [row.seconds for row in line],
            linestyle="--" if is_peer else "-",
            marker="o",
            markersize=3,
            label=f"{name}, L = {layers}",
        )
        ended = [row for row in line if row.limited]
        axes.scatter(
            [row.clients or 0 for row in ended],
            [row.seconds for row in ended],
            marker="x",
            s=60,
            color=drawn.get_color(),
        )
    if any(row.limited for row in scaled):
        axes.scatter([], [], marker="x", s=60, color="gray", label="ended by its limit")
    axes.set(xscale="log", yscale="log", xlabel="clients in the round", ylabel="seconds")
    axes.set_title("Time to select layers, proved optimal (gap ≤ 1e-6)")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    console.print(f"scaling plot: {path}")


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all rows here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the scaling plot here.")] = None,
    part: Annotated[list[Part] | None, typer.Option(help="Run only this; repeatable.")] = None,
    quick: Annotated[bool, typer.Option(help="Few, small instances: under a minute.")] = False,
    time_limit: Annotated[float, typer.Option(help="Seconds per solver and instance.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Seed of all instances.")] = 0,
) -> None:
    """Run the parts, print the figures, write the table and the plot."""
    limit = min(time_limit, 5.0) if quick else time_limit
    parts = part or list(Part)
    rows: list[Row] = []
    if Part.RANDOM in parts:
        rng = np.random.default_rng(seed)
        rows += random_instances(rng, 100 if quick else 1000, 10 if quick else 100, limit)
    if Part.COSTS in parts:
        rows += parameter_costs(np.random.default_rng(seed + 1), 10 if quick else 60, limit)
    peers = present_peers()
    if len(peers) < len(PEERS) and {Part.COMPARE, Part.SCALING} & set(parts):
        missing = ", ".join(name for name in PEERS if name not in peers)
        console.print(
            f"not installed, skipped: {missing}; `pip install cvxpy ecos`, with PuLP 4 `pulp[cbc]`"
        )
    if quick:
        peers = [peer for peer in peers if not peer.startswith("cvxpy")]  # they take minutes
    if Part.COMPARE in parts:
        sizes, lambdas = (SIZES[:1], [0.5]) if quick else (SIZES, [0.05, 0.5, 2.0])
        rng = np.random.default_rng(seed + 2)
        compared = list(compare(rng, sizes, lambdas, limit, peers))
        print_table(compared)
        rows += compared
    if Part.SCALING in parts:
        counts = [10, 100] if quick else [10, 30, 100, 300, 1000]
        rows += scaling(np.random.default_rng(seed + 3), counts, limit, peers)
    if plot is not None:
        draw(rows, plot)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
