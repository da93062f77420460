"""Every path that differs on a GPU, in two minutes: run it once on a new kind of card.

    python benchmarks/gpu_smoke.py --json gpu.json
    python benchmarks/gpu_smoke.py --device cpu        # rehearse the script itself

Each case is a run of two rounds on the digits. It must end without a failed client, with finite losses,
and close to the same run on the CPU where the case does not change the arithmetic. The last case
compares the memory of a step on all blocks with what the measurement promised.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from layerfed.client.costs import MEASURED_UNITS
from layerfed.client.devices import synchronize
from layerfed.client.training import selected_layers
from layerfed.client.workbench import Workbench, workbench
from layerfed.config import RunConfig, load_config
from layerfed.engine import Engine, run_on
from layerfed.runs import read_lines

COMMON = (
    *("run.seed=0", "run.checkpoint-every=0", "federation.clients=4", "federation.rounds=2"),
    *("federation.clients-per-round=2", "train.local-steps=2", "train.batch-size=16"),
)
CASES: dict[str, tuple[str, ...]] = {
    "as on the CPU": (),
    "probe of all statistics": ("strategy.name=snr", "strategy.theory=true"),
    "evaluation on clients": ("task.local-test=0.2",),
    "bfloat16": ("train.precision=bfloat16",),
    "adamw": ("train.optimizer=adamw",),
    "momentum": ("train.momentum=0.9",),
    "int8": ("exchange.codec=int8",),
    "privacy": ("privacy.mode=central", "privacy.noise=0.1", "strategy.name=top"),
    "budget in flops": ("budget.unit=flops",),
    "budget in seconds": ("budget.unit=seconds",),
    "budget in memory": ("budget.unit=memory",),
    "budget=auto": ("budget.kind=per-node",),
}
# Rounding differs between devices; two rounds of two steps carry it little further.
CLOSE = 0.02


def configured(folder: str, device: str, *overrides: str) -> RunConfig:
    return load_config(None, [*COMMON, f"run.dir={folder}", f"run.device={device}", *overrides])


def losses(folder: str, device: str, *overrides: str, engine: Engine = "inprocess") -> list[float]:
    """Run, and return the loss of each round, of training where it is not private."""
    auto = "budget.kind=per-node" in overrides
    config = configured(folder, device, *overrides)
    if config.budget.unit in MEASURED_UNITS:
        own, depth = workbench(config.to_flat()).costs(0, config.budget.unit)
        half = float(own.sum() + depth[0]) / 2
        config = configured(folder, device, *overrides, f"budget.layers={half}")
    path = run_on(engine, config, nodes=[{"budget": "auto"}] * 4 if auto else ())
    rows = [row for row in read_lines(path / "metrics.jsonl") if row["round"]]
    if failed := [row["failures"] for row in rows if row.get("failures")]:
        raise RuntimeError(f"clients failed: {failed}")
    found = [float(row["train_loss"] or row["loss"]) for row in rows]
    if not all(map(math.isfinite, found)):
        raise RuntimeError(f"losses {found}")
    return found


def as_on_the_cpu(folder: str, device: str) -> str:
    ours, theirs = losses(folder, device), losses(folder, "cpu")
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    if worst > CLOSE:
        raise RuntimeError(f"losses {ours}, on the CPU {theirs}")
    return f"losses differ by {worst:.1e}"


def on_ray(folder: str, device: str) -> str:
    """Compare clients that share the card, in actors of Ray, with clients one after another."""
    ours, theirs = losses(folder, device, engine="ray"), losses(folder, device)
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    if worst > CLOSE:
        raise RuntimeError(f"losses {ours}, in one process {theirs}")
    return f"losses differ by {worst:.1e}"


def memory_is_flat(folder: str, device: str) -> str:
    """Compare the peak of a round of a hundred clients with that of a round of four."""
    if not device.startswith("cuda"):
        return "measured on a GPU only"
    peaks = []
    for count in (4, 100):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        cohort = f"federation.clients={count}", f"federation.clients-per-round={count}"
        losses(folder, device, *cohort, "federation.rounds=1", "task.partition=iid")
        peaks.append(torch.cuda.max_memory_allocated(device))
    if peaks[1] > 1.05 * peaks[0]:
        raise RuntimeError(f"4 clients take {peaks[0]:.3g} bytes, 100 take {peaks[1]:.3g}")
    return f"{peaks[0] / 1e6:.1f} MB of 4 clients, {peaks[1] / 1e6:.1f} MB of 100"


def memory_kept(device: str) -> str:
    """Compare a step of training on all blocks with the sum that was measured for it."""
    bench = workbench(configured("unused", device).to_flat())
    own, depth = bench.costs(0, "memory")
    promised = bench.head_memory(0) + float(own.sum() + depth[0])
    needed = f"a client needs {bench.memory_needed(0) / 1e6:.0f} MB"
    if bench.device.type != "cuda":
        return needed
    taken = step_memory(bench)
    if taken > 1.05 * promised:
        raise RuntimeError(f"a step took {taken:.3g} bytes, promised were {promised:.3g}")
    return f"{taken / promised:.2f} of what was promised; {needed}"


def step_memory(bench: Workbench) -> float:
    """Return the rise of the allocator's peak in the second of two real steps."""
    model, layers, device = bench.resident.model, bench.resident.layers, bench.device
    batch = next(bench.examples(0)[0].in_order(bench.config.train.batch_size, device))
    rise = 0.0
    with selected_layers(model, layers, layers.names[1:]):
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            bench.task.loss(model, batch).backward()
            synchronize(device)
            rise = float(torch.cuda.max_memory_allocated(device) - before)
    return rise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="write the table there")
    arguments = parser.parse_args()
    device: str = arguments.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here: nothing was checked")
        return
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cases: dict[str, Callable[[], str]] = {
            case: lambda overrides=overrides: (
                f"losses {', '.join(f'{x:.3f}' for x in losses(folder, device, *overrides))}"
            )
            for case, overrides in CASES.items()
        }
        cases["as on the CPU"] = lambda: as_on_the_cpu(folder, device)
        cases["clients on Ray"] = lambda: on_ray(folder, device)
        cases["memory over 100 clients"] = lambda: memory_is_flat(folder, device)
        cases["memory of a step"] = lambda: memory_kept(device)
        print(f"{name}, torch {torch.__version__}\n\n| case | seconds | |\n|---|---|---|")
        for case, check in cases.items():
            began, well = time.monotonic(), True
            try:
                said = check()
            except Exception as error:  # the other cases are worth knowing all the same
                well, said = False, f"**{type(error).__name__}: {error}**"
            seconds = time.monotonic() - began
            rows.append({"case": case, "seconds": seconds, "well": well, "said": said})
            print(f"| {case} | {seconds:.1f} | {said} |", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if bad := [row["case"] for row in rows if not row["well"]]:
        raise SystemExit(f"failed: {', '.join(map(str, bad))}")


if __name__ == "__main__":
    main()
