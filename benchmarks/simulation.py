"""Seconds a round of the bare PyTorch loop, LayerFed's two engines, stock Flower, and pfl-research.

    python benchmarks/simulation.py --json simulation.json
    python benchmarks/simulation.py --workload cnn --contender bare --contender in-process --repeats 5

All contenders have the same model, data and local work, and one thread for each worker. Each runs in a
process of its own, all of them in turn and several times. The first rounds of each process are left out,
since they build models and load data. The table has the median of the rest, and its ratio to the bare
loop. pfl-research (`pip install pfl`) is skipped with a note if it is not installed.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
NAMES = {
    "cnn": ["bare", "in-process", "ray", "stock-flower-cached", "stock-flower", "pfl"],
    "digits": ["bare", "in-process", "ray", "stock-flower-cached", "stock-flower", "pfl"],
    "vit-b32": [
        *("bare", "bare-all-cores", "in-process", "ray"),
        *("stock-flower-cached", "stock-flower", "pfl"),
    ],
}
WorkloadName = StrEnum("WorkloadName", {name: name for name in NAMES})
ContenderName = StrEnum("ContenderName", {name: name for names in NAMES.values() for name in names})
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}
console = Console(width=120)


@dataclass(frozen=True)
class Row:
    """One contender on one workload."""

    workload: str
    contender: str
    seconds: float
    ratio: float
    rounds: int
    peak_gb: float


def measure(contender: str, workload: str, rounds: int) -> tuple[list[float], float]:
    """Run a contender in a process of its own; return its seconds a round and peak memory in GB."""
    done = subprocess.run(
        [
            sys.executable,
            __file__,
            "--work",
            contender,
            "--workload",
            workload,
            "--rounds",
            str(rounds),
        ],
        env={
            **os.environ,
            **QUIET,
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"{contender} on {workload} failed:\n{done.stderr[-3000:]}")
    found = json.loads(lines[-1])
    return found["seconds"], found["peak_gb"]


def work(contender: str, workload: str, rounds: int) -> None:
    """Run a contender in this process and print its figures as JSON."""
    import torch
    from contenders import CONTENDERS
    from workloads import WORKLOADS

    torch.set_num_threads(1)
    seconds = CONTENDERS[contender](WORKLOADS[workload], rounds)
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print("\n" + json.dumps({"seconds": seconds, "peak_gb": peak / 1e6}))


def main(
    workload: Annotated[list[WorkloadName] | None, typer.Option(help="only these")] = None,
    contender: Annotated[list[ContenderName] | None, typer.Option(help="only these")] = None,
    rounds: Annotated[int, typer.Option(help="rounds measured in each process")] = 4,
    warm_up: Annotated[int, typer.Option(help="rounds before them, left out")] = 2,
    repeats: Annotated[int, typer.Option(help="processes of each contender")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the table here")] = None,
    work_on: Annotated[ContenderName | None, typer.Option("--work", hidden=True)] = None,
) -> None:
    """Measure, print a table, and write it as JSON."""
    if work_on:
        assert workload
        work(work_on, workload[0], rounds)
        return
    rows: list[Row] = []
    names = list(workload or WorkloadName)
    for each in contender or []:
        if not any(each in NAMES[name] for name in names):
            raise typer.BadParameter(f"--contender {each} does not run on {', '.join(names)}")
    for name in names:
        asked = [c for c in NAMES[name] if not contender or c in contender]
        if "pfl" in asked and find_spec("pfl") is None:
            console.print("pfl-research is not installed and is left out (pip install pfl)")
            asked.remove("pfl")
        if not asked:
            console.print(f"nothing to measure on {name}")
            continue
        seconds: dict[str, list[float]] = {c: [] for c in asked}
        peaks: dict[str, float] = dict.fromkeys(asked, 0.0)
        for repeat in range(repeats):
            for each in asked:
                with console.status(f"{name}: {each}, {repeat + 1} of {repeats}"):
                    found, peak = measure(each, name, rounds + warm_up)
                seconds[each] += found[warm_up:]
                peaks[each] = max(peaks[each], peak)
        floor = statistics.median(seconds[asked[0]])
        found_rows = [
            Row(name, c, m := statistics.median(seconds[c]), m / floor, len(seconds[c]), peaks[c])
            for c in asked
        ]
        show(found_rows)
        rows += found_rows
    if json_file:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def show(rows: list[Row]) -> None:
    """Print one workload's table."""
    table = Table(title=f"{rows[0].workload}: seconds a round, median of {rows[0].rounds}")
    for column in ("contender", "seconds", f"times {rows[0].contender}", "peak memory, GB"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for row in rows:
        table.add_row(row.contender, f"{row.seconds:.3f}", f"{row.ratio:.2f}", f"{row.peak_gb:.2f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
