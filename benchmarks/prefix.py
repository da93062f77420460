"""FLOPs of a round with the frozen prefix computed once, beside the same run without.

    python -m benchmarks.prefix --rounds 3 --json prefix.json
    python -m benchmarks.prefix conf/cifar10.toml task.data=path/to/cifar10 model.name=layerfed/vit \
        model.weights=embedded train.batch-size=16 federation.clients-per-round=4 --within net.

Digits, or another configuration's job, on the shipped ViT, whose 12 blocks are selected in the top
quarter only: the top block, one of the three at random for each client, the one that the method
chooses, or all three. All clients train for five local epochs in each round. FLOPs are those that
clients count as they compute, with the probe; seconds are those of their training.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from layerfed.config import load_config
from layerfed.engine import run_on

QUARTER = "blocks.9", "blocks.10", "blocks.11"


def rounds_of(conf: Path | None, settings: list[str]) -> list[dict[str, Any]]:
    """Run in this process, and return the lines of `metrics.jsonl`."""
    with tempfile.TemporaryDirectory(prefix="layerfed-prefix-") as folder:
        run_on("inprocess", load_config(conf, [*settings, f"run.dir={folder}", "run.name=run"]))
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in lines.splitlines()]


def main(
    job: Annotated[list[str] | None, typer.Argument(help="[CONF] [KEY=VALUE]…")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    within: Annotated[
        str, typer.Option(help="what the names of the ViT's modules begin with")
    ] = "",
    megabytes: Annotated[float, typer.Option(help="train.prefix-cache")] = 100.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
) -> None:
    """Measure, print a table, and write it as JSON."""
    given = list(job or [])
    conf = Path(given.pop(0)) if given and "=" not in given[0] else None
    quarter = (
        f"model.blocks={', '.join(within + block for block in QUARTER)}",
        f"model.head={within}norm, {within}head",
    )
    selections = {
        "top block": ("strategy.name=top",),
        "one at random": ("strategy.name=random", *quarter),
        "one by ilp": ("strategy.name=ilp", *quarter),
        "whole quarter": ("strategy.name=top", "budget.layers=3"),
    }
    rows = []
    for selected, settings in selections.items():
        common = [
            *given,
            *settings,
            f"federation.rounds={rounds}",
            "train.local-steps=0",
            "train.local-epochs=5",
            "run.checkpoint-every=0",
        ]
        plain = rounds_of(conf, common)
        kept = rounds_of(conf, [*common, f"train.prefix-cache={megabytes}"])
        for before, after in zip(plain, kept, strict=True):
            if before.get("flops"):
                row: dict[str, Any] = {"selected": selected, "round": before["round"]}
                for key in ("flops", "flops_probe", "train_seconds", "train_loss"):
                    row |= {key: before[key], f"{key}_kept": after[key]}
                for key in ("flops", "flops_kept"):
                    row[key] += row[key.replace("flops", "flops_probe")]
                row["hits"] = after["prefix_hits"]
                rows.append(row)
    table = Table("selected", "round", "GFLOPs", "kept", "times fewer", "hits", "s", "s kept")
    for row in rows:
        table.add_row(
            row["selected"],
            str(row["round"]),
            f"{row['flops'] / 1e9:.1f}",
            f"{row['flops_kept'] / 1e9:.1f}",
            f"{row['flops'] / row['flops_kept']:.2f}",
            f"{row['hits']:.2f}",
            f"{row['train_seconds']:.1f}",
            f"{row['train_seconds_kept']:.1f}",
        )
    Console().print(table)
    if json_file:
        json_file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
