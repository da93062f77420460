"""Time and memory of an evaluation by the number of examples in a batch (`run.evaluate-batch`).

    python benchmarks/evaluation.py                                # the shipped ViT on 32x32 images
    python benchmarks/evaluation.py --model timm/resnet18 --size 224 --examples 64

Prints for each batch size, and for images whose channels lie side by side (`channels_last`), the time
and the added memory as ratios to those of the largest batch. Each is measured in a process of its own,
since peaks of memory do not fall. Printed too is the time of a training step on 8 images in that order,
as a ratio to one in the other.
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
from layerfed.models.image import ImageClassifier, build_image_classifier
from layerfed.task import Examples

SIZES = (8, 16, 32, 64, 128, 256)


def network(model: str, last: bool) -> ImageClassifier:
    """Return a model that computes with channels side by side, or with each channel's pixels."""
    torch.set_num_threads(1)
    weights = "embedded" if model.startswith("layerfed") else "random"
    net = build_image_classifier(ModelConfig(name=model, weights=weights), 10, 0)
    net.format = torch.channels_last if last else torch.contiguous_format
    return net


def pixels(count: int, size: int) -> torch.Tensor:
    """Return random images in bytes."""
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def stepped(model: str, size: int, last: bool) -> float:
    """Return the seconds of forward and backward of all layers on 8 images, the least of three."""
    net, images, seconds = network(model, last), pixels(8, size), []
    for _ in range(4):
        began = time.perf_counter()
        net(images).square().mean().backward()
        seconds.append(time.perf_counter() - began)
        net.zero_grad()
    return min(seconds[1:])


def measured(model: str, size: int, examples: int, batch: int, last: bool) -> tuple[float, float]:
    """Return the seconds of an evaluation, the least of three, and its added memory in MB."""
    net, images = network(model, last), pixels(examples, size)
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
    sizes = [size for size in SIZES if size <= asked.examples]
    cases = [(size, last) for last in (False, True) for size in sizes]
    found = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for case in reversed(cases):
            found[case] = pool.apply(measured, (asked.model, asked.size, asked.examples, *case))
        one, other = (
            pool.apply(stepped, (asked.model, asked.size, last)) for last in (False, True)
        )
    seconds, memory = found[sizes[-1], False]
    print(f"{sizes[-1]}: {seconds:.2f} s, {memory:.0f} MB; a step on 8: {one:.2f} s")
    rows = []
    for (size, last), (time_, space) in sorted(found.items(), key=lambda entry: entry[0][::-1]):
        rows.append({"batch": size, "channels_last": last, "seconds": time_, "megabytes": space})
        kind = "channels_last" if last else "contiguous"
        print(f"{size:4} {kind:13} time x{time_ / seconds:.2f}, memory x{space / memory:.2f}")
    print(f"a step on 8 images, channels_last: time x{other / one:.2f}")
    if asked.json:
        content = {"evaluation": rows, "step": {"contiguous": one, "channels_last": other}}
        asked.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
