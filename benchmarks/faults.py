"""Faults in a federation of real processes: SuperLink, gateway and two SuperNodes on loopback.

    python benchmarks/faults.py                                 # all, about half an hour
    python benchmarks/faults.py --fault killed-in-training --json faults.json

Each fault gets a federation of its own, and happens in the first of two rounds. "model" says whether the
final model equals, to 1e-5, that of a simulation in which the faulty node is silent in the same places.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from scene import FAULTY, NODES, Scene, changed_app, verdict

from layerfed.config import Scalar
from layerfed.deploy.federation import RunStatus
from layerfed.deploy.processes import commands
from layerfed.deploy.rehearsal import on_loopback
from layerfed.runs import read_lines
from layerfed.runs.signals import clean_up_on_sigterm
from layerfed_assets import BACKBONE

GARBAGE = """
    for name in list(arrays):
        arrays[name] = Array(np.full_like(arrays[name].numpy(), np.nan))
"""
SLOW_SECONDS, PATIENCE_SECONDS = 240, 120
SLOW = f"""
    if config["round"] == 1:
        time.sleep({SLOW_SECONDS})
"""
# The signal with which the kernel ends a process that is out of memory.
KILLED = """
    if config["round"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
"""


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


def out_of_memory(scene: Scene) -> RunStatus:
    """Kill the node's ClientApp process in the first round's training, but not its SuperNode."""
    scene.app = changed_app(scene, KILLED)
    return scene.finish(scene.start())


def process_killed(scene: Scene) -> RunStatus:
    """Kill the node's own process in the first round's training; the next round has another one."""
    run = scene.start()
    scene.wait_for_message("train")
    family = commands(scene.nodes[FAULTY].pid)
    # The keeper has started it, so that its id is the later one.
    process = max(pid for pid, line in family.items() if "layerfed.deploy.node_process" in line)
    os.kill(process, signal.SIGKILL)
    return scene.finish(run)


def layer_without_nodes(scene: Scene) -> RunStatus:
    """Each node trains a block of its own. One node is killed, so no node trains its block."""
    scene.overrides |= {"strategy.name": "random", "run.seed": 1, "federation.rounds": 1}
    run = scene.start()
    scene.wait_for_message("train")
    scene.kill()
    status = scene.finish(run)
    (row,) = read_lines(scene.folder / "selection.jsonl")
    masks = np.array(row["masks"], dtype=bool)
    before, after = load_file(BACKBONE), load_file(scene.folder / "final.safetensors")
    for client, mask in zip(row["clients"], masks, strict=True):
        (block,) = np.flatnonzero(mask)
        names = [name for name in before if name.startswith(f"blocks.{block}.")]
        moved = any(
            name in after and not np.array_equal(before[name], after[name]) for name in names
        )
        scene.found.append(
            f"blocks.{block} of client {client} {'moved' if moved else 'is bit-identical'}"
        )
    return status


def empty_cache(scene: Scene) -> RunStatus:
    """Empty the node's layer store between rounds, so that the server must send its layers again."""
    # Each round trains other layers, so the node also loses some that the next round does not send.
    scene.overrides |= {"strategy.name": "random", "federation.rounds": 3}
    run = scene.start()
    scene.wait_for_round(2)
    for file in (scene.loopback.folder / f"node-{FAULTY}/layers").iterdir():
        file.unlink()
    status = scene.finish(run)
    for row in read_lines(scene.folder / "ledger.jsonl"):
        down = ", ".join(f"{size / 1e3:.0f}" for size in row["bytes_moved_down"])
        scene.found.append(f"round {row['round']}: {down} kB down")
    return status


def joins_late(scene: Scene) -> RunStatus:
    scene.overrides |= {"federation.clients": 3, "federation.rounds": 3}
    run = scene.start()
    scene.wait_for_round(1)
    scene.loopback.start_node("node-2", {"partition-id": 2, "num-partitions": 3})
    return scene.finish(run)


def hangs(scene: Scene) -> RunStatus:
    """Stop the whole node in the first round's training, and let it continue after that round."""
    run = scene.start()
    scene.wait_for_message("train")
    scene.loopback.processes.signal(scene.nodes[FAULTY], signal.SIGSTOP)
    scene.wait_for_round(1)
    scene.loopback.processes.signal(scene.nodes[FAULTY], signal.SIGCONT)
    return scene.finish(run)


def slower_than_the_timeout(scene: Scene) -> RunStatus:
    """Make the node's training so slow that the server stops waiting in the first round."""
    scene.overrides |= {"federation.timeout": PATIENCE_SECONDS}
    scene.app = changed_app(scene, SLOW)
    return scene.finish(scene.start())


def client_raises(scene: Scene) -> RunStatus:
    """Make the client raise in every round, by its own limit on the seconds of a step."""
    return scene.finish(scene.start())


def garbage_reply(scene: Scene) -> RunStatus:
    """Make the node's updates NaN in every round."""
    scene.app = changed_app(scene, GARBAGE)
    return scene.finish(scene.start())


def superlink_restarted(scene: Scene) -> RunStatus:
    """Restart the SuperLink: the present run is lost, and the nodes serve the next one unchanged."""
    lost = scene.start("lost")
    scene.wait_for_message("train")
    scene.loopback.processes.kill(scene.loopback.server)
    scene.loopback.start_superlink()
    scene.wait_for_nodes()
    federation = scene.loopback.federation
    scene.wait("the run is over", lambda: federation.status(lost).finished)
    scene.found.append(f"the run in progress: {federation.status(lost).status}")
    return scene.finish(scene.start())


def read_only_run_folder(scene: Scene) -> RunStatus:
    scene.runs = Path("/proc/nobody-writes-here")
    return scene.finish(scene.start())


def full_disk(scene: Scene) -> RunStatus:
    """Fill the run folder's disk after the first round, and make room again for the resumed run."""
    with small_disk(scene.runs):
        run = scene.start()
        scene.wait("a checkpoint", (scene.folder / "checkpoint/round-000001").exists)
        ballast = scene.runs / "ballast"
        fill(ballast)
        failed = scene.finish(run)
        whole = [len(read_lines(file)) for file in sorted(scene.folder.glob("*.jsonl"))]
        scene.found.append(f"{failed.status}, {failed.details}; lines kept: {whole}")
        ballast.unlink()
        status = scene.finish(scene.resume())
        # The disk is gone after the scene, and the verdict reads the folder.
        kept = scene.loopback.folder / "kept"
        shutil.copytree(scene.folder, kept / "faulty")
    scene.runs = kept
    return status


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount a disk of 16 MB in memory."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    subprocess.run(mount, check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=30)


def fill(file: Path) -> None:
    """Write until the disk is full."""
    size = 1 << 20
    with file.open("wb", buffering=0) as stream:
        while size:
            try:
                stream.write(b"\0" * size)
            except OSError:
                size //= 2


FAULTS: dict[str, Callable[[Scene], RunStatus]] = {
    "killed-in-probe": killed_in_probe,
    "killed-in-training": killed_in_training,
    "killed-between-rounds": killed_between_rounds,
    "out-of-memory": out_of_memory,
    "process-killed": process_killed,
    "layer-without-nodes": layer_without_nodes,
    "empty-cache": empty_cache,
    "joins-late": joins_late,
    "hangs": hangs,
    "slower-than-the-timeout": slower_than_the_timeout,
    "client-raises": client_raises,
    "garbage-reply": garbage_reply,
    "superlink-restarted": superlink_restarted,
    "read-only-run-folder": read_only_run_folder,
    "full-disk": full_disk,
}
SETTINGS: Mapping[str, Mapping[str, Scalar]] = {"client-raises": {"max-step-seconds": 1e-9}}
# Faults that cannot be run everywhere, and why.
IMPOSSIBLE = {"full-disk": "only root can mount a disk" if os.geteuid() else ""}


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
            scene.wait_for_nodes()
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
        if reason := IMPOSSIBLE.get(name):
            print(f"{name}: left out, since {reason}", file=sys.stderr)
            continue
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
