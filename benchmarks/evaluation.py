"""Time and memory of an evaluation by the number of examples in a batch (`run.evaluate-batch`).

    python benchmarks/evaluation.py                                # the shipped ViT on 32x32 images
    python benchmarks/evaluation.py --model timm/resnet18 --size 224 --examples 256

Prints for each batch size, and for convolutions in `channels_last`, the time and the added memory as
ratios to those of 256. Each is measured in a process of its own, since peaks of memory do not fall.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path

import torch

from layerfed.client.training import evaluate
from layerfed.config import ModelConfig
from layerfed.models.image import build_image_classifier
from layerfed.task import Examples

SIZES = (8, 16, 32, 64, 128, 256)


def measured(model: str, size: int, examples: int, batch: int, last: bool) -> tuple[float, float]:
    """Return the seconds of an evaluation, the least of three, and its added memory in MB."""
    torch.set_num_threads(1)
    weights = "embedded" if model.startswith("layerfed") else "random"
    net = build_image_classifier(ModelConfig(name=model, weights=weights), 10, 0)
    if last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randint(0, 256, (examples, 3, size, size), dtype=torch.uint8)
    held = Examples.of({"image": images, "label": torch.zeros(examples, dtype=torch.int64)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    with torch.inference_mode():
        for _ in range(3):
            began = time.perf_counter()
            batches = held.in_order(batch, torch.device("cpu"))
            evaluate(net, batches, lambda model, found: model(found["image"]))
            seconds.append(time.perf_counter() - began)
    return min(seconds), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="layerfed/vit")
    parser.add_argument("--size", type=int, default=32, help="side of the images, in pixels")
    parser.add_argument("--examples", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    asked = parser.parse_args()
    cases = [(size, last) for last in (False, True) for size in SIZES]
    found = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for case in reversed(cases):
            found[case] = pool.apply(measured, (asked.model, asked.size, asked.examples, *case))
    seconds, memory = found[SIZES[-1], False]
    print(f"256: {seconds:.2f} s, {memory:.0f} MB")
    rows = []
    for (size, last), (time_, space) in sorted(found.items(), key=lambda entry: entry[0][::-1]):
        rows.append({"batch": size, "channels_last": last, "seconds": time_, "megabytes": space})
        kind = "channels_last" if last else "contiguous"
        print(f"{size:4} {kind:13} time x{time_ / seconds:.2f}, memory x{space / memory:.2f}")
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
