"""CPU seconds of starting a ClientApp in a new process, as each message on real devices does.

    python benchmarks/startup.py --json startup.json

Each stage runs in processes of its own: what Flower's process imports for any app, without torch; this
with the app that passes messages to a node's process; torch alone; Flower's ClientApp with torch, which
is the least that any app with torch takes; the import of this app; and the import with the first message
of each kind, on digits. The first process of a machine fills caches; it runs before and does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

STAGES = (
    "flwr-clientapp",
    "node app",
    "torch",
    "stock Flower app",
    "import",
    "describe",
    "probe",
    "train",
)
SETTINGS = ["federation.clients=4", "federation.clients-per-round=4", "run.device=cpu"]


def stage(name: str) -> None:
    """Run a ClientApp's process up to some stage."""
    if name in ("flwr-clientapp", "node app"):
        import flwr.clientapp
        import flwr.supernode.cli.flwr_clientapp  # noqa: F401

        if name == "node app":
            import layerfed.node_app  # noqa: F401
        return
    import torch

    torch.set_num_threads(1)
    if name == "torch":
        return
    if name == "stock Flower app":
        from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
        from flwr.clientapp import ClientApp

        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            arrays = ArrayRecord(torch.nn.Linear(10, 10).state_dict())
            content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"n": 1})})
            return Message(content, reply_to=message)

        return
    from layerfed.client_app import client_app

    if name != "import":
        first_message(client_app, name)


def first_message(client_app: object, name: str) -> None:
    """Answer one message like a node that has only the pretrained base."""
    from flwr.app import ArrayRecord, Context, RecordDict

    from layerfed.client.workbench import workbench
    from layerfed.config import NodeConfig, load_config
    from layerfed.exchange import Manifest, instruction
    from layerfed.flower_compat import enter_run

    enter_run()
    flat = load_config(None, SETTINGS).to_flat()
    node = {"partition-id": 0, "num-partitions": 4, "store": "memory"}
    kind, config = "query.describe", {}
    manifest = arrays = None
    if name != "describe":
        resident = workbench(flat, NodeConfig.read(node)).resident
        digests = {layer.name: resident._digest(layer.name) for layer in resident.layers.layers}
        manifest, arrays = Manifest(resident.base, digests), ArrayRecord()
        mask = [1] + [0] * (resident.layers.num_blocks - 1)
        kind, config = {
            "probe": ("query.probe", {"statistics": ["grad_norm_sq"], "batches": 1}),
            "train": ("train", {"mask": mask, "lr": 0.05, "codec": "float32", "run": "x"}),
        }[name]
    message = instruction(
        kind, 1, server_round=1, timeout=60, manifest=manifest, arrays=arrays, config=config
    )
    context = Context(1, 1, node, RecordDict(), flat)
    reply = client_app(message, context)  # type: ignore[operator]
    assert reply.has_content(), reply.error


def cpu_seconds(name: str) -> float:
    """Return the user and system time of a process that runs up to a stage."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    process = subprocess.Popen([sys.executable, __file__, "--stage", name], env=variables)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the process of stage {name} ended with {status}")
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the table there")
    parser.add_argument("--stage", choices=STAGES, help="for a process of this script's own")
    arguments = parser.parse_args()
    if arguments.stage:
        stage(arguments.stage)
        return
    cpu_seconds("train")
    rows = []
    print("| up to | CPU s, median | least |\n|---|---|---|")
    for name in STAGES:
        taken = [cpu_seconds(name) for _ in range(arguments.repeat)]
        rows.append({"stage": name, "median": statistics.median(taken), "least": min(taken)})
        print(f"| {name} | {rows[-1]['median']:.2f} | {rows[-1]['least']:.2f} |", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
