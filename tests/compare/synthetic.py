"""Run folders like those of real runs, written without a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerfed.compare import Cell
from layerfed.config import RunConfig

BLOCKS = 4


def write_run(
    folder: Path,
    config: RunConfig,
    accuracies: Sequence[float] = (0.5,),
    *,
    status: str = "completed",
    engine: str = "inprocess",
    torch: str = "2.14.1",
    **line: Any,
) -> None:
    """Write a run in which two clients train block 0 in each round."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_flat()))
    (folder / "summary.json").write_text(
        json.dumps(
            {
                "status": status,
                "rounds": len(accuracies),
                "initial_accuracy": 0.1,
                "accuracy": accuracies[-1],
                "engine": engine,
                "versions": {"torch": torch, "layerfed": "0.1.0"},
            }
        )
    )
    layers = [("embeddings", "embeddings", 400, 10.0)]
    layers += [(f"blocks.{i}", "block", 1000, 40.0) for i in range(BLOCKS)]
    layers += [("head", "head", 100, 5.0)]
    rows = [
        {"name": n, "kind": k, "elements": b // 4, "bytes": b, "forward_flops": f}
        for n, k, b, f in layers
    ]
    (folder / "layers.json").write_text(json.dumps({"forward_flops": 180.0, "layers": rows}))
    figures = {
        "clients": 2,
        "loss": None,
        "seconds": 4.0,
        "seconds_by_phase": {"train": 3.0},
        "bytes_up": 2200,
        "bytes_down": 1100,
        "bytes_full_up": 9000,
        "bytes_full_down": 9000,
        "flops": 4e12,
        "flops_probe": 2e12,
        "steps": 10,
        "train_seconds": 5.0,
        "peak_memory": 5e6,
        "peak_memory_probe": 7e6,
        "e1": None,
        "e2": 0.25,
        "e2_masks": 0.0,
    }
    metrics = [
        {"round": i, "accuracy": accuracy, **figures, **line}
        for i, accuracy in enumerate(accuracies, start=1)
    ]
    masks = [[1] + [0] * (BLOCKS - 1)] * 2
    selections = [{"round": row["round"], "masks": masks} for row in metrics]
    for name, lines in (("metrics", metrics), ("selection", selections)):
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (folder / f"{name}.jsonl").write_text(text)


def write_cell(cell: Cell, accuracies: Sequence[float] = (0.5,), **line: Any) -> None:
    """Write the run folder of a cell."""
    write_run(cell.folder, cell.config, accuracies, **line)
