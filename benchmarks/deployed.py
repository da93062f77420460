"""Seconds and CPU seconds of a message and a round on real processes, with and without a node's process.

    python benchmarks/deployed.py --json deployed.json
    python benchmarks/deployed.py --contender node-process --nodes 2 --rounds 2

SuperLink, gateway and SuperNodes run on loopback, on the digits job. The contender `stock` is the same
app with a stock ClientApp: Flower's process for each message imports torch, loads the model and works
itself. `probe-after` is the app whose clients measure after their training: one message a client and
round in place of two. Every Python process of the federation writes its CPU time when it ends, and
processes that outlive the run are read from /proc before and after it. A round's CPU time is that of
all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import layerfed
from layerfed.config import load_config
from layerfed.deploy.processes import commands
from layerfed.deploy.rehearsal import on_loopback
from layerfed.runs import read_lines
from layerfed.runs.signals import clean_up_on_sigterm

AFTER = "probe-after"
CONTENDERS = ("node-process", "stock", AFTER)
APP = "flwr-clientapp"
TICKS = os.sysconf("SC_CLK_TCK")
# Python imports a module of this name at its start.
CLOCK = """
import atexit, json, os, resource, sys, time

began = time.monotonic()

def note():
    used = resource.getrusage(resource.RUSAGE_SELF)
    entry = {
        "pid": os.getpid(),
        "program": os.path.basename(sys.argv[0]),
        "seconds": time.monotonic() - began,
        "cpu": used.ru_utime + used.ru_stime,
    }
    with open(os.environ["CLOCK_FILE"], "a") as file:
        file.write(json.dumps(entry) + "\\n")

atexit.register(note)
"""


@contextmanager
def clocked(folder: Path) -> Iterator[Path]:
    """Let every Python process that starts in this context write its times to the yielded file."""
    (folder / "sitecustomize.py").write_text(CLOCK, encoding="utf-8")
    before, file = dict(os.environ), folder / "times.jsonl"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), before.get("PYTHONPATH", "")])
    os.environ["CLOCK_FILE"] = str(file)
    try:
        yield file
    finally:
        os.environ.clear()
        os.environ.update(before)


def living() -> dict[int, float]:
    """Return the CPU seconds of each living process of the federation, by process id."""
    found = {}
    for pid in commands(os.getpid()).keys() - {os.getpid()}:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue  # it has just ended
        found[pid] = (int(fields[11]) + int(fields[12])) / TICKS
    return found


def measured(name: str, nodes: int, rounds: int) -> dict[str, Any]:
    """Run the digits job on a federation of its own; return the times of a message and a round."""
    settings = [
        *(f"federation.clients={nodes}", f"federation.clients-per-round={nodes}"),
        *(f"federation.rounds={rounds}", "run.device=cpu", "run.name=timed"),
        f"strategy.probe={'after' if name == AFTER else 'before'}",
    ]
    source = Path(layerfed.__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = load_config(None, [*settings, f"run.dir={folder}/runs"])
        own = [{"partition-id": i, "num-partitions": nodes, "threads": 1} for i in range(nodes)]
        (folder / "clock").mkdir()
        with (
            clocked(folder / "clock") as file,
            on_loopback(folder / "federation", own, keep_model=name != "stock") as loopback,
        ):
            before = living()
            status = loopback.federation.follow(loopback.start_run(source, config))
            after, ended = living(), read_lines(file)
            if not status.completed:
                raise SystemExit(f"{name}: the run {status.status}: {status.details}")
        took = [row["seconds"] for row in read_lines(folder / "runs/timed/metrics.jsonl")]
    apps = [row for row in ended if row["program"] == APP]
    cpu = sum(row["cpu"] - before.get(row["pid"], 0.0) for row in ended)
    cpu += sum(spent - before.get(pid, 0.0) for pid, spent in after.items())
    return {
        "contender": name,
        "nodes": nodes,
        "rounds": rounds,
        "messages": len(apps),
        "message_seconds": statistics.median(row["seconds"] for row in apps),
        "message_cpu_seconds": statistics.median(row["cpu"] for row in apps),
        "round_seconds": statistics.median(took[1:] or took),
        "round_cpu_seconds": cpu / rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--contender", choices=CONTENDERS, action="append", help="by default all")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4, help="the first is not timed")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    clean_up_on_sigterm()
    rows = []
    columns = ["messages", "message_seconds", "message_cpu_seconds"]
    columns += ["round_seconds", "round_cpu_seconds"]
    print("| |", " | ".join(name.replace("_", " ") for name in columns), "|")
    print("|---" * (len(columns) + 1) + "|")
    for name in arguments.contender or CONTENDERS:
        rows.append(measured(name, arguments.nodes, arguments.rounds))
        print(f"| {name} |", " | ".join(f"{rows[-1][c]:.4g}" for c in columns), "|", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
