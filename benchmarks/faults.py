"""What faults do to a federation of real processes: SuperLink, gateway, two SuperNodes, on loopback.

    python benchmarks/faults.py                                 # all, about half an hour
    python benchmarks/faults.py --fault killed-in-training --json faults.json

Each fault gets a federation of its own, and is played in the first of two rounds. "model" tells whether
the final model is, to 1e-5, that of a simulation in which the faulty node is silent where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.constant import SUPERLINK_NODE_ID
from safetensors.numpy import load_file

from layerfed.client_app import build_client_app
from layerfed.config import Flat, Scalar, load_config
from layerfed.deploy.federation import DeploymentFailed, RunStatus, environment
from layerfed.deploy.processes import clean_up_on_sigterm
from layerfed.deploy.rehearsal import Loopback, on_loopback
from layerfed.engine import InProcessGrid
from layerfed.runs import read_lines
from layerfed.server_app import build_server_app

ROOT = Path(__file__).resolve().parents[1]
NODES = 2
WAIT_SECONDS = 900.0
FAULTY = 1  # the partition whose node goes wrong

# A client that is not what it should be, in place of the app's own.
CHANGED_CLIENT = '''
"""A client that goes wrong on purpose."""

import time

import numpy as np
from flwr.app import Array

from layerfed.client_app import build_client_app


def wrong(message, context, call_next):
    training = message.metadata.message_type == "train"
    if not training or context.node_config["partition-id"] != {faulty}:
        return call_next(message, context)
    config = message.content.config_records["config"]
    reply = call_next(message, context)
    arrays = reply.content.array_records["arrays"]
{change}
    return reply


client_app = build_client_app([wrong])
'''
GARBAGE = """
    for name in list(arrays):
        arrays[name] = Array(np.full_like(arrays[name].numpy(), np.nan))
"""
SLOW_SECONDS, PATIENCE_SECONDS = 240, 120
SLOW = f"""
    if config["round"] == 1:
        time.sleep({SLOW_SECONDS})
"""


@dataclass
class Scene:
    """One fault in one federation."""

    loopback: Loopback
    runs: Path
    nodes: dict[int, Popen[bytes]]
    overrides: dict[str, Scalar] = field(default_factory=dict)
    app: Path = ROOT

    def configured(self, name: str = "faulty") -> Any:
        settings: dict[str, Scalar] = {
            "federation.clients": NODES,
            "federation.clients-per-round": NODES,
            "federation.min-replies": 1,
            "federation.rounds": 2,
            "federation.timeout": 300,
            "run.device": "cpu",
            "run.dir": str(self.runs),
            "run.name": name,
            **self.overrides,
        }
        return load_config(None, [f"{key}={value}" for key, value in settings.items()])

    def start(self, name: str = "faulty") -> int:
        return self.loopback.start_run(self.app, self.configured(name))

    def finish(self, run: int) -> RunStatus:
        return self.loopback.federation.follow(run, WAIT_SECONDS)

    def wait(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not ready():
            if time.monotonic() > deadline:
                raise DeploymentFailed(f"{what}: not after {WAIT_SECONDS:g} s")
            time.sleep(0.05)

    def wait_for_message(self, kind: str) -> None:
        """Wait until the faulty node has a message in hand."""
        log = self.loopback.processes.logs / f"node-{FAULTY}.log"
        self.wait(kind, lambda: f"Receiving: {kind} message" in log.read_text(errors="replace"))

    def wait_for_round(self, number: int) -> None:
        file = self.runs / "faulty/metrics.jsonl"
        self.wait(f"round {number}", lambda: file.exists() and len(read_lines(file)) >= number)

    def kill(self) -> None:
        self.loopback.processes.signal(self.nodes[FAULTY], signal.SIGKILL)


# ------------------------------------------------------------------------------------ the faults
def killed_in_probe(scene: Scene) -> RunStatus:
    run = scene.start()
    scene.wait_for_message("query.probe")
    scene.kill()
    return scene.finish(run)


def killed_in_training(scene: Scene) -> RunStatus:
    run = scene.start()
    scene.wait_for_message("train")
    scene.kill()
    return scene.finish(run)


def killed_between_rounds(scene: Scene) -> RunStatus:
    run = scene.start()
    scene.wait_for_round(1)
    scene.kill()
    return scene.finish(run)


def joins_late(scene: Scene) -> RunStatus:
    scene.overrides |= {"federation.clients": 3, "federation.rounds": 3}
    run = scene.start()
    scene.wait_for_round(1)
    scene.loopback.start_node("node-2", {"partition-id": 2, "num-partitions": 3})
    return scene.finish(run)


def hangs(scene: Scene) -> RunStatus:
    """The whole node stops in the first round's training, and goes on once the round has."""
    run = scene.start()
    scene.wait_for_message("train")
    scene.loopback.processes.signal(scene.nodes[FAULTY], signal.SIGSTOP)
    scene.wait_for_round(1)
    scene.loopback.processes.signal(scene.nodes[FAULTY], signal.SIGCONT)
    return scene.finish(run)


def slower_than_the_timeout(scene: Scene) -> RunStatus:
    """It is alive, and still at the first round's training when the server waits no longer."""
    scene.overrides |= {"federation.timeout": PATIENCE_SECONDS}
    scene.app = changed_app(scene, SLOW)
    return scene.finish(scene.start())


def client_raises(scene: Scene) -> RunStatus:
    """Its own limit on the seconds of a step makes it raise in every round."""
    return scene.finish(scene.start())


def garbage_reply(scene: Scene) -> RunStatus:
    """Its updates are NaN in every round."""
    scene.app = changed_app(scene, GARBAGE)
    return scene.finish(scene.start())


def changed_app(scene: Scene, change: str) -> Path:
    """Return a copy of the app in which the faulty node's client does something else."""
    copy = scene.loopback.folder / "app"
    shutil.copytree(ROOT / "layerfed", copy / "layerfed")
    for name in ("README.md", "LICENSE", "conf/default.toml"):
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    code = CHANGED_CLIENT.format(faulty=FAULTY, change=change)
    (copy / "layerfed/changed.py").write_text(code, encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = project.replace("layerfed.client_app:client_app", "layerfed.changed:client_app")
    (copy / "pyproject.toml").write_text(project, encoding="utf-8")
    return copy


def superlink_restarted(scene: Scene) -> RunStatus:
    """The run in progress is lost; the next one, `again`, needs nothing done to the nodes."""
    federation, processes = scene.loopback.federation, scene.loopback.processes
    lost = scene.start("lost")
    scene.wait_for_message("train")
    processes.signal(scene.loopback.server, signal.SIGKILL)
    port = int(scene.loopback.superlink.rpartition(":")[2])
    variables = environment(federation.flower_home)
    processes.start("superlink-again", federation.superlink_command(port), variables)

    def back() -> bool:
        try:
            return federation.online() >= NODES and federation.status(lost).finished
        except DeploymentFailed:
            return False

    scene.wait("nodes are back", back)
    print(f"the run in progress: {federation.status(lost).status}", file=sys.stderr)
    return scene.finish(scene.start())


def read_only_run_folder(scene: Scene) -> RunStatus:
    scene.runs = Path("/proc/nobody-writes-here")
    return scene.finish(scene.start())


FAULTS: dict[str, Callable[[Scene], RunStatus]] = {
    "killed-in-probe": killed_in_probe,
    "killed-in-training": killed_in_training,
    "killed-between-rounds": killed_between_rounds,
    "joins-late": joins_late,
    "hangs": hangs,
    "slower-than-the-timeout": slower_than_the_timeout,
    "client-raises": client_raises,
    "garbage-reply": garbage_reply,
    "superlink-restarted": superlink_restarted,
    "read-only-run-folder": read_only_run_folder,
}
SETTINGS: Mapping[str, Mapping[str, Scalar]] = {"client-raises": {"max-step-seconds": 1e-9}}


# ----------------------------------------------------------------------------------- the verdict
def replayed(folder: Path, flat: Flat) -> dict[str, np.ndarray]:
    """Run in one process what a run folder tells; whoever did not answer there does not here."""
    absent: set[tuple[str, int, int]] = set()
    for row in read_lines(folder / "selection.jsonl"):
        everyone = range(int(flat["federation.clients"]))
        absent |= {("query.probe", row["round"], c) for c in everyone if c not in row["clients"]}
    for row in read_lines(folder / "metrics.jsonl"):
        for failure in row["failure_reasons"]:
            if failure["phase"] == "train":
                absent.add(("train", row["round"], failure["client"]))

    def silent(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        config = message.content.config_records["config"]
        partition = int(context.node_config["partition-id"])  # type: ignore[arg-type]
        if (message.metadata.message_type, config["round"], partition) in absent:
            raise TimeoutError("silent")
        return call_next(message, context)

    # Whoever was not sampled is silent too, so everyone can be asked.
    flat = {**flat, "federation.clients-per-round": flat["federation.clients"]}
    grid = InProcessGrid(build_client_app([silent]), int(flat["federation.clients"]), flat)
    with tempfile.TemporaryDirectory() as runs:
        flat |= {"run.dir": runs, "run.name": "replay", "exchange.store": "memory"}
        context = Context(1, SUPERLINK_NODE_ID, {}, RecordDict(), flat)
        build_server_app([], lambda path: None)(grid, context)
        return load_file(Path(runs) / "replay/model.safetensors")


def verdict(scene: Scene, status: RunStatus) -> dict[str, Any]:
    folder = scene.runs / "faulty"
    row: dict[str, Any] = {"status": status.status, "details": status.details}
    if not (folder / "metrics.jsonl").exists():
        return row | {
            "rounds": 0,
            "lost": None,
            "happened": status.details,
            "model": "no run folder",
        }
    rounds = read_lines(folder / "metrics.jsonl")
    asked = int(scene.configured().federation.rounds)
    reasons = [
        f"round {r['round']}, {f['phase']}: {f['reason']}"
        for r in rounds
        for f in r["failure_reasons"]
    ]
    chosen = [r["clients"] for r in read_lines(folder / "selection.jsonl")]
    row |= {
        "rounds": len(rounds),
        "lost": asked - len(rounds),
        "clients": chosen,
        "seconds": [round(r["seconds"]) for r in rounds],
        "happened": "; ".join(reasons) or "all answered",
    }
    if not (folder / "model.safetensors").exists():
        return row | {"model": "none"}
    model = load_file(folder / "model.safetensors")
    expected = replayed(folder, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    worst = max(float(np.abs(model[n] - expected[n]).max()) for n in model if model[n].size)
    return row | {"model": "same" if worst <= 1e-5 else f"differs by {worst:.1e}"}


def play(name: str) -> dict[str, Any]:
    began = time.monotonic()
    count = 3 if name == "joins-late" else NODES
    with tempfile.TemporaryDirectory(prefix="layerfed-faults-") as private:
        folder = Path(private)
        with on_loopback(folder, []) as loopback:
            nodes = {}
            for partition in range(NODES):
                own = SETTINGS.get(name, {}) if partition == FAULTY else {}
                settings = {"partition-id": partition, "num-partitions": count, **own}
                nodes[partition] = loopback.start_node(f"node-{partition}", settings)
            scene = Scene(loopback, folder / "runs", nodes)
            scene.wait("SuperNodes connect", lambda: loopback.federation.online() >= NODES)
            row = verdict(scene, FAULTS[name](scene))
    return {"fault": name, **row, "total_seconds": round(time.monotonic() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--fault", action="append", choices=FAULTS, help="several times; all if none"
    )
    parser.add_argument("--json", type=Path, help="write the table there")
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    clean_up_on_sigterm()
    rows = []
    for name in arguments.fault or FAULTS:
        row = play(name)
        rows.append(row)
        print(
            f"| {name} | {row['status']} | {row['happened']} | {row['lost']} | {row['model']} |",
            flush=True,
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
