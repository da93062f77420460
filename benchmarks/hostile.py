"""Accuracy on digits, by aggregation rule, if some clients send the opposite of their updates.

    python benchmarks/hostile.py --json hostile.json            # 16 runs of 10 rounds
    python benchmarks/hostile.py --hostile 1 --rounds 5 federation.clients-per-round=5

There are ten clients with one layer each, as in conf/default.toml. A hostile client answers probes
honestly, trains like the others, and sends its update times -10. "clip" is the mean of updates that are
scaled down to a norm of `--clip`. The trimmed mean leaves out 30% at either end. Settings at the end are
those of `layerfed run`.
"""

from __future__ import annotations

import json
import logging
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from flwr.app import Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.constant import SUPERLINK_NODE_ID
from rich.console import Console
from rich.table import Table

from layerfed.client_app import build_client_app
from layerfed.config import load_config
from layerfed.engine import HERE, InProcessGrid
from layerfed.exchange import encode
from layerfed.runs.records import RoundFailed
from layerfed.server_app import build_server_app

DEFENCES = {
    "mean": [],
    "clip": ["server.clip={clip}"],
    "median": ["server.aggregation=median"],
    "trimmed-mean": ["server.aggregation=trimmed-mean", "server.trim=0.3"],
}
console = Console()


def opposite(hostile: int, factor: float) -> Mod:
    """Let the clients of the first partitions send their updates times -factor."""

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        reply = call_next(message, context)
        partition = int(context.node_config["partition-id"])  # type: ignore[arg-type]
        if message.metadata.message_type == "train" and partition < hostile:
            arrays = reply.content.array_records["arrays"]
            for name, array in list(arrays.items()):
                values = array.numpy()
                if np.issubdtype(values.dtype, np.floating):
                    arrays[name] = encode(values * values.dtype.type(-factor))
        return reply

    return mod


def work(hostile: int, factor: float, settings: list[str]) -> dict[str, Any]:
    """Run once; return the figures of the run's summary and last round."""
    with tempfile.TemporaryDirectory() as runs:
        config = load_config(None, [*settings, f"run.dir={runs}", "run.name=run"])
        flat = config.to_flat()
        clients = config.federation.clients
        grid = InProcessGrid(build_client_app([opposite(hostile, factor)]), clients, flat)
        context = Context(1, SUPERLINK_NODE_ID, dict(HERE), RecordDict(), flat)
        # Clients whose model has become NaN give nothing usable. The accuracy until then counts.
        with suppress(RoundFailed):
            build_server_app([], lambda path: None)(grid, context)
        summary = json.loads((Path(runs) / "run/summary.json").read_text(encoding="utf-8"))
    return {key: summary[key] for key in ("rounds", "accuracy", "failures", "seconds", "status")}


def main(
    settings: Annotated[list[str] | None, typer.Argument(help="key=value …")] = None,
    hostile: Annotated[list[int] | None, typer.Option(help="how many of the clients")] = None,
    factor: Annotated[float, typer.Option(help="what their updates are multiplied by")] = 10.0,
    clip: Annotated[float, typer.Option(help="largest norm, where it is clipped")] = 1.0,
    rounds: int = 10,
    seed: int = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the table here")] = None,
) -> None:
    """Run, print a table, and write it as JSON."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    counts = [0, 1, 2, 3] if hostile is None else hostile
    rows = []
    table = Table("of 10 clients hostile", *DEFENCES, title="accuracy in %")
    for count in counts:
        cells = []
        for name, defence in DEFENCES.items():
            own = [setting.format(clip=clip) for setting in defence]
            common = [f"federation.rounds={rounds}", f"run.seed={seed}", "run.device=cpu"]
            found = work(count, factor, [*common, *own, *(settings or [])])
            rows.append({"hostile": count, "aggregation": name, **found})
            ended = "" if found["status"] == "completed" else f" (round {found['rounds']}, failed)"
            cells.append(f"{100 * found['accuracy']:.2f}{ended}")
            console.print(rows[-1], highlight=False)
            if json_file is not None:
                json_file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        table.add_row(str(count), *cells)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
