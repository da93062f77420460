"""Growth of memory, descriptors, threads and files over the rounds of a long run.

    python benchmarks/load.py --json load.json                    # all three, half an hour
    python benchmarks/load.py --engine inprocess --rounds 100
    python benchmarks/load.py --engine superlink --nodes 8

`inprocess` and `ray` simulate 100 clients; `superlink` runs 8 SuperNodes as processes on loopback. The
slope is that of a least-squares line through the rounds after the warm-up.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sampling import Usage, command, descendants, disk, growth, of_processes
from scene import Scene

from layerfed.config import Scalar, load_config
from layerfed.deploy.processes import commands
from layerfed.deploy.rehearsal import Loopback, on_loopback
from layerfed.engine import run_on
from layerfed.runs.records import Observer, RoundRecord
from layerfed.runs.signals import clean_up_on_sigterm

ENGINES = ("inprocess", "ray", "superlink")
# A smaller growth counts as none, since pages come and go.
STEADY = {"MB": 0.05, "descriptors": 0.1, "threads": 0.1, "files": 0.1}
# One step on a few examples and no probe, since only the number of messages matters.
TINY: dict[str, Scalar] = {
    "task.partition": "iid",
    "strategy.name": "random",
    "train.local-steps": 1,
    "train.batch-size": 8,
    "run.device": "cpu",
}

Sample = dict[str, float]


class Sampler(Observer):
    """Takes a sample after each round."""

    def __init__(self, take: Callable[[], Sample]) -> None:
        self._take = take
        self.samples: list[Sample] = []

    def on_round(self, record: RoundRecord) -> None:
        self.samples.append(self._take())


def named(who: str, usage: Usage) -> Sample:
    return {
        f"{who}, MB": usage.memory / 1e6,
        f"{who}, descriptors": usage.descriptors,
        f"{who}, threads": usage.threads,
    }


def stored(what: str, folder: Path) -> Sample:
    files, size = disk(folder)
    return {f"{what}, files": files, f"{what} on disk, kB": size / 1e3}


def simulated(engine: str, clients: int, rounds: int) -> list[Sample]:
    """Run a simulation, and sample this process and its descendants."""
    with tempfile.TemporaryDirectory(prefix="layerfed-load-") as private:
        folder = Path(private)
        settings: dict[str, Scalar] = {
            **TINY,
            "federation.clients": clients,
            "federation.clients-per-round": clients,
            "federation.rounds": rounds,
            "run.dir": private,
            "run.name": "load",
            # Given here, since the Ray engine would otherwise make a store at an unknown place.
            "exchange.store": str(folder / "layers"),
        }
        # Room for two versions of the model, as the Ray engine's own store has.
        settings["exchange.store-size"] = 0.012

        def take() -> Sample:
            gc.collect()
            sample = named("this process", of_processes([os.getpid()]))
            if others := descendants(os.getpid()):
                clients = [pid for pid in others if command(pid).startswith("ray::Clients")]
                sample |= named("clients' processes", of_processes(clients))
                sample |= named("Ray itself", of_processes(set(others) - set(clients)))
            return (
                sample
                | stored("layer store", folder / "layers")
                | stored("run folder", folder / "load")
            )

        sampler = Sampler(take)
        config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
        run_on(engine, config, [sampler])
        return sampler.samples


def deployed(nodes: int, rounds: int, note: Callable[[list[Sample]], None]) -> list[Sample]:
    """Run on SuperNodes, and sample each process of the federation after each round."""
    with tempfile.TemporaryDirectory(prefix="layerfed-load-") as private:
        folder = Path(private)
        settings = [{"partition-id": i, "num-partitions": nodes} for i in range(nodes)]
        with on_loopback(folder, settings) as loopback:
            overrides = {
                **TINY,
                "federation.clients": nodes,
                "federation.clients-per-round": nodes,
                "federation.min-replies": nodes,
                "federation.rounds": rounds,
                "federation.timeout": 900,
            }
            scene = Scene(loopback, folder / "runs", {}, overrides)
            run = scene.start()
            samples: list[Sample] = []
            for number in range(1, rounds + 1):
                scene.wait_for_round(number)
                samples.append(of_federation(loopback, scene))
                note(samples)
            status = scene.finish(run)
            if not status.completed:
                raise SystemExit(f"run {status.status}: {status.details}")
    return samples


def of_federation(loopback: Loopback, scene: Scene) -> Sample:
    """Return the usage of the federation's processes, and of its files on disk."""
    server = loopback.server.pid
    nodes = [pid for pid, said in commands(os.getpid()).items() if "flower-supernode" in said]
    others = set(commands(server)) - {server}  # some have left its tree, not its group
    state = sum(file.stat().st_size for file in loopback.federation.folder.glob("state.db*"))
    return {
        **named("SuperLink", of_processes([server])),
        **named("ServerApp and launcher", of_processes(others)),
        **named("gateway", of_processes([loopback.door.pid])),
        **named("SuperNodes together", of_processes(nodes)),
        "state.db, kB": state / 1e3,
        **stored("server's Flower home", loopback.federation.flower_home),
        **stored("a node's folder", loopback.folder / "node-0"),
        **stored("run folder", scene.folder),
        **stored("logs", loopback.processes.logs),
    }


def summary(samples: list[Sample], warm_up: int) -> Iterator[dict[str, Any]]:
    """Yield each quantity after the warm-up and at the end, and its growth."""
    for name in samples[-1] if samples else ():
        values = [sample.get(name, 0.0) for sample in samples]
        slope = growth(values, warm_up)
        limit = STEADY.get(name.rpartition(", ")[2])
        yield {
            "what": name,
            "after_warm_up": values[min(warm_up, len(values) - 1)],
            "at_the_end": values[-1],
            "growth": slope,
            "steady": None if limit is None else slope <= limit,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--engine", action="append", choices=ENGINES, help="several times; all if none"
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=5, help="rounds that do not count")
    parser.add_argument("--clients", type=int, default=100, help="of a simulation")
    parser.add_argument("--nodes", type=int, default=8, help="of the real processes")
    parser.add_argument("--json", type=Path, help="write the table there")
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    clean_up_on_sigterm()
    written: list[dict[str, Any]] = []
    warm_up: int = arguments.warm_up

    def write(engine: str, samples: list[Sample]) -> None:
        rows = [
            {"engine": engine, "rounds": len(samples), **row} for row in summary(samples, warm_up)
        ]
        if arguments.json:
            text = json.dumps([*written, *rows], indent=2)
            arguments.json.write_text(text + "\n", encoding="utf-8")

    for engine in arguments.engine or ENGINES:
        if engine == "superlink":
            samples = deployed(arguments.nodes, arguments.rounds, partial(write, engine))
        else:
            samples = simulated(engine, arguments.clients, arguments.rounds)
        print(f"\n| {engine} | round {warm_up + 1} | round {len(samples)} | a round |")
        print("|---|---|---|---|")
        for row in summary(samples, warm_up):
            mark = {True: "", False: " **grows**", None: ""}[row["steady"]]
            print(
                f"| {row['what']} | {row['after_warm_up']:.1f} | {row['at_the_end']:.1f} | "
                f"{row['growth']:+.3f}{mark} |",
                flush=True,
            )
            written.append({"engine": engine, "rounds": len(samples), **row})
        write(engine, [])


if __name__ == "__main__":
    main()
