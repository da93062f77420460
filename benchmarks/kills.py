"""A run on real processes whose server is killed many times, and resumed each time.

    python benchmarks/kills.py --kills 20 --json kills.json     # a quarter of an hour

At random moments the ServerApp, the SuperLink, or the whole server (both, and the gateway) gets a
kill -9. A run that is ahead of its kills gets the next one at once, so that all kills come before its
end. The killed processes are started again, and `layerfed deploy run --resume` continues the run from
its last checkpoint. In the end masks and weights are compared with an undisturbed simulation.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from scene import NODES, Scene

from layerfed.config import Scalar
from layerfed.deploy.federation import DeploymentFailed
from layerfed.deploy.processes import commands
from layerfed.deploy.rehearsal import Comparison, on_loopback
from layerfed.engine import run_on
from layerfed.runs import read_lines
from layerfed.runs.signals import clean_up_on_sigterm

VICTIMS = ("serverapp", "superlink", "server")
# Masks that differ by round, no probe, and a server optimiser with a state.
SETTINGS: dict[str, Scalar] = {
    "strategy.name": "random",
    "server.optimizer": "momentum",
    "server.momentum": 0.5,
    "federation.min-replies": NODES,
}
LONGEST_WAIT = 600.0
# Each look at the run's status through the SuperLink costs seconds of a core.
LOOK_SECONDS = 45.0


@dataclass
class Kill:
    """One kill and its cost.

    Attributes
    ----------
    number : int
    victim : str
    life : float
        Seconds since the run was started or resumed.
    in_flight : int
        The round that was cut off.
    lost : int
        Rounds that were in the run folder and had to be repeated, since no checkpoint had them.
    seconds : float or None
        Seconds until the resumed run finished a round; None if the next kill came first.
    """

    number: int
    victim: str
    life: float
    in_flight: int
    lost: int
    seconds: float | None = None


class Server:
    """The server of a scene, whose parts are killed and started again."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.run = 0
        self.failed: list[str] = []
        """The ends of runs that were not killed; there should be none."""

    def go_on(self) -> None:
        """Start the run, or resume it if it has a checkpoint."""
        self.run = self.scene.resume()

    def kill(self, victim: str) -> None:
        """Kill a part, start it again, and wait until no process writes the run folder any more."""
        loopback = self.scene.loopback
        apps = self._server_apps()
        if victim == "serverapp":
            for pid in apps:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            loopback.processes.kill(loopback.server, alone=victim == "superlink")
        if victim == "server":
            loopback.processes.kill(loopback.door)
            loopback.start_gateway()
        if victim != "serverapp":
            loopback.start_superlink()
        # A ServerApp that lost its SuperLink keeps the folder until it notices.
        self.scene.wait(
            "the ServerApp is gone",
            lambda: not any(map(lives, apps)),
            LONGEST_WAIT,
        )
        self.scene.wait_for_nodes()

    def finished(self) -> bool:
        """Say whether the run has its final model."""
        return (self.scene.folder / "final.safetensors").exists()

    def check(self) -> None:
        """Resume a run that failed by itself."""
        with suppress(DeploymentFailed):
            status = self.scene.loopback.federation.status(self.run)
            if status.finished and not status.completed and not self.finished():
                self.failed.append(f"{status.status}: {status.details}")
                print(self.failed[-1], flush=True)
                self.go_on()

    def _server_apps(self) -> list[int]:
        listed = commands(self.scene.loopback.server.pid)
        return [pid for pid, command in listed.items() if "flwr-serverapp" in command]


def lives(pid: int) -> bool:
    """Return whether a process is alive, and not a zombie."""
    with suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        return stat.rpartition(")")[2].split()[0] != "Z"
    return False


def newest_checkpoint(folder: Path) -> int:
    """Return the round of the newest checkpoint, 0 if there is none."""
    return max((int(p.name[6:]) for p in (folder / "checkpoint").glob("round-*")), default=0)


def run_among_kills(
    server: Server,
    kills: int,
    longest_life: float,
    seed: int,
    note: Callable[[list[Kill]], None],
) -> list[Kill]:
    """Run to the end, with a number of kills on the way."""
    draws, done, scene = random.Random(seed), list[Kill](), server.scene
    rounds = scene.configured("planned").federation.rounds
    killed = time.monotonic()
    server.go_on()
    while True:
        began = looked = time.monotonic()
        kept = newest_checkpoint(scene.folder)
        more = len(done) < kills
        life = draws.uniform(0.0, longest_life) if more else LONGEST_WAIT * 10
        latest = rounds * (len(done) + 1) // (kills + 1) if more else rounds
        while time.monotonic() - began < life and not server.finished():
            time.sleep(0.2)
            if more and scene.rounds() >= latest:
                break
            if done and done[-1].seconds is None and newest_checkpoint(scene.folder) > kept:
                done[-1].seconds = round(time.monotonic() - killed, 1)
            if time.monotonic() - looked > LOOK_SECONDS:
                server.check()
                looked = time.monotonic()
        if server.finished():
            return done
        killed, victim, in_flight = time.monotonic(), draws.choice(VICTIMS), scene.rounds() + 1
        server.kill(victim)
        lost = scene.rounds() - newest_checkpoint(scene.folder)
        done.append(Kill(len(done) + 1, victim, round(killed - began, 1), in_flight, lost))
        print(done[-1], flush=True)
        note(done)
        server.go_on()


def table(kills: list[Kill]) -> str:
    """Return the kills as a table."""
    lines = [
        "| kill | what | after, s | round in flight | rounds done again | s to the next round |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {k.number} | {k.victim} | {k.life:.0f} | {k.in_flight} | {k.lost} | "
        f"{'killed before' if k.seconds is None else f'{k.seconds:.0f}'} |"
        for k in kills
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=24, help="more than --kills")
    parser.add_argument(
        "--longest-life",
        type=float,
        default=75.0,
        help="seconds: about what starting, and two or three rounds, take",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--json", type=Path, help="write the kills there, each as it happens")
    arguments = parser.parse_args()
    if arguments.rounds <= arguments.kills:
        parser.error(f"--rounds {arguments.rounds} must be above --kills {arguments.kills}")

    def note(kills: list[Kill], **outcome: object) -> None:
        if arguments.json:
            rows = [*(asdict(kill) for kill in kills), *([outcome] if outcome else [])]
            arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")

    logging.getLogger("flwr").setLevel(logging.ERROR)
    clean_up_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="layerfed-kills-") as private:
        folder = Path(private)
        nodes = [{"partition-id": i, "num-partitions": NODES} for i in range(NODES)]
        with on_loopback(folder, nodes) as loopback:
            overrides = {**SETTINGS, "federation.rounds": arguments.rounds}
            scene = Scene(loopback, folder / "runs", {}, overrides)
            server, began = Server(scene), time.monotonic()
            kills = run_among_kills(
                server, arguments.kills, arguments.longest_life, arguments.seed, note
            )
            status = scene.finish(server.run)
            took = time.monotonic() - began
        undisturbed = run_on("inprocess", scene.configured("undisturbed"))
        found = Comparison.of(undisturbed, scene.folder)
        failures = sum(row["failures"] for row in read_lines(scene.folder / "metrics.jsonl"))
    print(table(kills))
    print(
        f"{arguments.rounds} rounds in {took:.0f} s with {len(kills)} kills: {status.status}; masks "
        f"{'identical' if found.masks else 'DIFFER'}, final weights differ by at most "
        f"{found.weights:.1e}; {failures} failures of clients, {len(server.failed)} of runs that "
        f"nobody killed; finished rounds done again: {sum(kill.lost for kill in kills)}"
    )
    note(
        kills,
        seconds=round(took),
        rounds=arguments.rounds,
        status=status.status,
        masks=found.masks,
        weights=found.weights,
        failures=failures,
        failed=server.failed,
    )
    raise SystemExit(0 if found.same and len(kills) == arguments.kills else 1)


if __name__ == "__main__":
    main()
