"""Runs whose results must not change, and the comparison of their results.

    python -m tests.golden.runs            # compare with runs.json and print what differs
    python -m tests.golden.runs --write    # record anew, after a change that is meant

`runs.json` holds for each run the masks of every round, the bytes of the ledger, the loss of every
round, and a sketch of the final model: for each tensor ‖θ‖ and a projection on a fixed random
direction. A sketch differs by rounding between processors and versions of torch, so it is compared
with a tolerance; the digest of the weights, which is exact, is compared by the command above only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from layerfed.config import load_config
from layerfed.digests import content_digest
from layerfed.engine import run_on
from layerfed.flower_compat import enter_run
from layerfed.privacy import protection
from layerfed.runs import read_lines
from tests.made_up import final_tensors

FILE = Path(__file__).with_name("runs.json")
# Of a sketch and of losses, relative: the rounding of some hundred float32 steps.
TOLERANCE = 1e-4

COMMON = (
    "run.seed=0",
    "run.threads=1",
    "strategy.consistency=0.1",
    "run.evaluate-every=2",
    "run.checkpoint-every=0",
    "federation.clients=10",
    "federation.rounds=2",
    "federation.clients-per-round=4",
    "train.local-steps=2",
    "train.batch-size=16",
)
RUNS: dict[str, tuple[str, ...]] = {
    "ilp": ("budget.kind=half-normal",),
    "ilp-period": ("strategy.period=2", "strategy.theory=true", "task.local-test=0.2"),
    "ilp-flops": ("budget.unit=flops", "budget.layers=6e8"),
    "random": ("strategy.name=random", "budget.layers=2"),
    "random-resampled": ("strategy.name=random", "strategy.resample-steps=1"),
    "snr": ("strategy.name=snr",),
    "fedtlu-client": ("strategy.name=fedtlu", "strategy.side=client"),
    "int8": ("exchange.codec=int8",),
    "momentum": ("server.optimizer=momentum", "server.lr=0.5"),
    "median-clipped": ("strategy.name=top", "server.aggregation=median", "server.clip=0.05"),
    "secagg-top": ("strategy.name=top", "secagg.enabled=true"),
    "privacy-central": ("privacy.mode=central", "privacy.noise=1.0", "privacy.delta=0.001"),
    "privacy-local": ("privacy.mode=local", "privacy.noise=0.5", "privacy.delta=0.001"),
}


@contextmanager
def seeded_noise() -> Iterator[None]:
    """Draw the noise of differential privacy from a seed, for a run to be repeated."""
    rng, real = np.random.default_rng(0), protection.gaussian

    def drawn(count: int, entropy: object = None) -> np.ndarray:
        return real(count, rng.bytes)

    with patch.object(protection, "gaussian", drawn):
        yield


def sketch(tensors: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Reduce each tensor to its norm and a projection on a fixed random direction."""
    found = {}
    for name, tensor in sorted(tensors.items()):
        flat = tensor.astype(np.float64).ravel()
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest())
        direction = np.random.default_rng(seed).standard_normal(flat.size)
        length = np.sqrt(max(flat.size, 1))
        found[name] = [float(f"{x:.8g}") for x in (np.linalg.norm(flat), direction @ flat / length)]
    return found


def run(name: str, folder: Path) -> dict[str, Any]:
    """Run one of `RUNS` and return the results that are compared."""
    enter_run()
    config = load_config(None, [*COMMON, *RUNS[name], f"run.dir={folder}", f"run.name={name}"])
    with seeded_noise():
        path = run_on("inprocess", config)
    metrics = read_lines(path / "metrics.jsonl")
    selection = read_lines(path / "selection.jsonl")
    tensors = final_tensors(path)
    base = {n: t.tobytes() for n, t in sorted(tensors.items())}
    ledger = [
        {k: v for k, v in row.items() if k.startswith("bytes") or k == "clients"}
        for row in read_lines(path / "ledger.jsonl")
    ]
    return {
        "masks": [row["masks"] for row in selection],
        "updated": [row.get("updated") for row in selection],
        "ledger": ledger,
        "train_loss": [row["train_loss"] for row in metrics],
        "loss": [row["loss"] for row in metrics],
        "e1": [row["e1"] for row in metrics],
        "e2": [row["e2"] for row in metrics],
        "sketch": sketch(tensors),
        "digest": content_digest(*base.values()),
    }


def main() -> None:
    """Record the runs, or compare them bit by bit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="record anew")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {name: run(name, Path(folder)) for name in RUNS}
    if args.write:
        FILE.write_text(json.dumps(found, indent=None, separators=(",", ":")) + "\n")
        return
    known = json.loads(FILE.read_text())
    for name, result in found.items():
        different = [key for key in result if result[key] != known[name][key]]
        print(f"{name}: {'the same to the bit' if not different else ', '.join(different)}")


if __name__ == "__main__":
    main()
