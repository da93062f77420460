"""CPU time and memory of loading a task's examples, first on a new machine and then in a new process.

    python benchmarks/loading.py task.name=cifar10 task.data=path/to/cifar10 federation.clients=100

Settings are those of `layerfed run`. Each row is a process of its own, and the first one has an empty
cache. `private_mb` is the memory that is not of a memory-mapped file, without that of imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer


def measure(settings: list[str]) -> dict[str, float]:
    """Load a task in this process; return seconds and bytes."""
    import datasets
    import numpy as np
    import torch

    from layerfed.config import load_config
    from layerfed.task import images, load_task, text

    assert images
    assert text  # the libraries are imported before the clock starts

    datasets.disable_progress_bars()
    file = Path(settings.pop(0)) if settings and "=" not in settings[0] else None
    config = load_config(file, settings)
    imported = _private()
    began = time.process_time()
    task = load_task(config)
    test = task.test_examples()
    ready = time.process_time()
    parts = [task.partition(i) for i in range(config.federation.clients)]
    shared = time.process_time()
    device, rng = torch.device("cpu"), np.random.default_rng(0)
    for part in parts:
        next(part.shuffled(config.train.batch_size, device, rng))
    batches = time.process_time()
    return {
        "data_seconds": round(ready - began, 3),
        "partition_seconds": round(shared - ready, 3),
        "batch_ms": round(1e3 * (batches - shared) / len(parts), 3),
        "private_mb": round((_private() - imported) / 1e6, 1),
        "train_examples": sum(map(len, parts)),
        "test_examples": len(test),
    }


def _private() -> int:
    """Return this process's bytes that no file backs and no other process shares (Linux)."""
    fields = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in fields if line.startswith("Anonymous:")) * 1024


def main(
    settings: Annotated[list[str], typer.Argument(metavar="[CONF] [KEY=VALUE]...")],
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    here: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    if here:
        print(json.dumps(measure(settings)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for run in ("first", "again"):
            command = [sys.executable, __file__, "--here", *settings]
            environment = {**os.environ, "HF_DATASETS_CACHE": cache}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            rows.append({"run": run, **json.loads(done.stdout.splitlines()[-1])})
            print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
