"""Scenes: runs on real processes with a fault, and the check of their results."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
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
from layerfed.config import Flat, RunConfig, Scalar, load_config
from layerfed.deploy.federation import DeploymentFailed, RunStatus
from layerfed.deploy.rehearsal import Loopback
from layerfed.engine import InProcessGrid
from layerfed.runs import latest_checkpoint, read_lines
from layerfed.server_app import build_server_app

__all__ = ["FAULTY", "NODES", "ROOT", "Scene", "changed_app", "replayed", "verdict"]

ROOT = Path(__file__).resolve().parents[1]
NODES = 2
WAIT_SECONDS = 900.0
FAULTY = 1  # the partition whose node goes wrong

# A faulty client, which replaces the app's own.
CHANGED_CLIENT = '''
"""A client that goes wrong on purpose."""

import os
import signal
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


@dataclass
class Scene:
    """One federation and its runs."""

    loopback: Loopback
    runs: Path
    nodes: dict[int, Popen[bytes]]
    overrides: dict[str, Scalar] = field(default_factory=dict)
    app: Path = ROOT
    found: list[str] = field(default_factory=list)
    """Observations of the fault's function, beside those in the run folder."""

    def configured(self, name: str = "faulty") -> RunConfig:
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

    @property
    def folder(self) -> Path:
        return self.runs / "faulty"

    def start(self, name: str = "faulty") -> int:
        return self.loopback.start_run(self.app, self.configured(name))

    def resume(self) -> int:
        """Resume the run, or start it again if it has no checkpoint yet."""
        if latest_checkpoint(self.folder) is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return self.start()
        config = self.configured()
        section = config.run.model_copy(update={"resume": str(self.folder)})
        return self.loopback.start_run(self.app, config.model_copy(update={"run": section}))

    def finish(self, run: int) -> RunStatus:
        return self.loopback.federation.follow(run, WAIT_SECONDS)

    def wait(
        self,
        what: str,
        ready: Callable[[], bool],
        timeout: float = WAIT_SECONDS,
        every: float = 0.05,
    ) -> None:
        deadline = time.monotonic() + timeout
        while not ready():
            if time.monotonic() > deadline:
                raise DeploymentFailed(f"{what}: not after {timeout:g} s")
            time.sleep(every)

    def wait_for_message(self, kind: str) -> None:
        """Wait until the faulty node works on a message."""
        log = self.loopback.processes.logs / f"node-{FAULTY}.log"
        self.wait(kind, lambda: f"Receiving: {kind} message" in log.read_text(errors="replace"))

    def rounds(self) -> int:
        file = self.folder / "metrics.jsonl"
        return len(read_lines(file)) if file.exists() else 0

    def wait_for_round(self, number: int) -> None:
        self.wait(f"round {number}", lambda: self.rounds() >= number)

    def wait_for_nodes(self, count: int = NODES) -> None:
        """Wait until a number of nodes are connected; the SuperLink may be restarting."""

        def online() -> bool:
            try:
                return self.loopback.federation.online() >= count
            except DeploymentFailed:
                return False

        self.wait("SuperNodes connect", online, every=3.0)  # each look costs seconds of a core

    def kill(self) -> None:
        self.loopback.processes.kill(self.nodes[FAULTY])


def changed_app(scene: Scene, change: str) -> Path:
    """Return a copy of the app with a changed client for the faulty node."""
    copy = scene.loopback.folder / "app"
    shutil.copytree(ROOT / "layerfed", copy / "layerfed")
    for name in ("README.md", "LICENSE", "conf/default.toml"):
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    code = CHANGED_CLIENT.format(faulty=FAULTY, change=change)
    (copy / "layerfed/changed.py").write_text(code, encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = project.replace("layerfed.node_app:client_app", "layerfed.changed:client_app")
    (copy / "pyproject.toml").write_text(project, encoding="utf-8")
    return copy


# ----------------------------------------------------------------------------------- the verdict
def replayed(folder: Path, flat: Flat) -> dict[str, np.ndarray]:
    """Repeat a run folder's run in one process; clients that did not answer there are silent here."""
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

    # Clients that were not sampled are silent too, so all can be asked.
    flat = {**flat, "federation.clients-per-round": flat["federation.clients"]}
    grid = InProcessGrid(build_client_app([silent]), int(flat["federation.clients"]), flat)
    with tempfile.TemporaryDirectory() as runs:
        flat |= {"run.dir": runs, "run.name": "replay", "exchange.store": "memory"}
        context = Context(1, SUPERLINK_NODE_ID, {}, RecordDict(), flat)
        build_server_app([], lambda path: None)(grid, context)
        return load_file(Path(runs) / "replay/final.safetensors")


def verdict(scene: Scene, status: RunStatus) -> dict[str, Any]:
    folder = scene.folder
    row: dict[str, Any] = {"status": status.status, "details": status.details}
    if not (folder / "metrics.jsonl").exists():
        return row | {
            "rounds": 0,
            "lost": None,
            "happened": status.details,
            "model": "no run folder",
        }
    rounds = read_lines(folder / "metrics.jsonl")
    asked = scene.configured().federation.rounds
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
        "happened": "; ".join([*scene.found, *(reasons or ["all answered"])]),
    }
    if not (folder / "final.safetensors").exists():
        return row | {"model": "none"}
    model = load_file(folder / "final.safetensors")
    expected = replayed(folder, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    if model.keys() != expected.keys():
        return row | {"model": "differs in its layers"}
    worst = max(float(np.abs(model[n] - expected[n]).max()) for n in model if model[n].size)
    return row | {"model": "same" if worst <= 1e-5 else f"differs by {worst:.1e}"}
