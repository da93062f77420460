"""Seconds, FLOPs and peak memory of a training step, by what is trained, beside plain PyTorch and LoRA.

    python -m benchmarks.training --shapes vit,xlmr --json training.json
    python -m benchmarks.training --shapes llama-1b --methods run --storage bfloat16
    python -m benchmarks.training --shapes vit-b32 --storage float32 --device cuda --compile

`head`, `top`, `middle`, `bottom` and `all` are steps of LayerFed on those blocks and the head. `kept` is
`top` with the outputs of all blocks below kept (`train.prefix-cache`), in an epoch after the first.
`quarter` is the lowest block of the top quarter.
`probe` is LayerFed's probe, `probe-upper` and `probe-lower` are probes of half of the layers
(`strategy.probe-share`). `plain` is full fine-tuning in PyTorch. `lora` is PEFT with r = 16 on all
linear layers. `run` is a whole run in this process: the server and two clients, two rounds on the top
block.
The floor is the closed form of a step: forward of all layers, the inputs' gradients above the lowest
trained block, the weights' gradients of what is trained, at the speed that `plain` reaches.

Each number is of a process of its own, and its memory is the peak of the process, or of the tensors on a
GPU. Weights are random. LLaMA is read from a checkpoint in bfloat16 that is written first (2.2 and
13.5 GB); `llama-7b` needs a GPU, on which its weights are drawn. Further settings, such as
`train.precision=bfloat16`, are for all methods.

With `--compile` each block goes through `torch.compile`, and for `plain` and `lora` the whole model;
`longest` is the step that compiled, and `graphs` how many graphs it made: at 0 nothing was compiled.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast, get_args

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from layerfed.client.devices import autocast, choose_device, chosen_precision, synchronize
from layerfed.client.flops import TotalFlops, forward_flops
from layerfed.client.local_optimizers import LocalSGD
from layerfed.client.prediction import masks_named
from layerfed.client.prefix import PrefixCache
from layerfed.client.probe import probe_layers
from layerfed.client.resident import ResidentModel
from layerfed.client.training import Step, train_layers
from layerfed.config import ConfigError, Storage, load_config
from layerfed.config.errors import one_line_errors
from layerfed.models.image import build_image_classifier
from layerfed.models.layers import LayerMap
from layerfed.models.text import build_text_classifier
from layerfed.task import Batch, Examples, Task, load_task
from layerfed.task.text import TextTask

CLASSES, STEPS = 5, 4
BLOCKS = ("head", "top", "quarter", "middle", "bottom", "all")
PROBES = ("probe", "probe-upper", "probe-lower")
METHODS = (*BLOCKS, "kept", *PROBES, "plain", "lora", "run")


@dataclass(frozen=True)
class Shape:
    """A model, the size of a batch, and the side of an image or the length of a text."""

    model: str
    batch: int
    size: int
    config: tuple[str, dict[str, int]] | None = None
    saved: bool = False
    gpu: bool = False


LLAMA = {"num_attention_heads": 32, "vocab_size": 32000, "pad_token_id": 0}
SHAPES = {
    "vit": Shape("layerfed/vit", 32, 32),
    "vit-b32": Shape("open_clip/ViT-B-32", 32, 224),
    "efficientnet": Shape("timm/tf_efficientnet_lite0", 64, 224),
    "xlmr": Shape(
        "", 16, 64, ("xlm-roberta", {"vocab_size": 250002, "max_position_embeddings": 514})
    ),
    "llama-1b": Shape(
        "",
        4,
        32,
        (
            "llama",
            {
                **LLAMA,
                "hidden_size": 2048,
                "intermediate_size": 5632,
                "num_hidden_layers": 22,
                "num_key_value_heads": 4,
            },
        ),
        saved=True,
    ),
    "llama-7b": Shape(
        "",
        16,
        128,
        (
            "llama",
            {**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
        ),
        saved=True,
        gpu=True,
    ),
}


class Rows(Task):
    """Random images, or texts in the subclass, as many as a step or a round needs."""

    settings: ClassVar[frozenset[str]] = frozenset({"image_size", "max_tokens"})
    reads: ClassVar[str] = "image"

    @property
    def of_text(self) -> bool:
        """Whether the model reads texts."""
        return self.config.model.family == "transformers"

    def build_model(self) -> nn.Module:
        """Return the model."""
        seed = self.config.run.seed
        if not self.of_text:
            return build_image_classifier(self.config.model, CLASSES, seed)
        return build_text_classifier(self.config.model, CLASSES, seed, pad_token=0)

    def rows(self, count: int) -> Batch:
        """Return random rows."""
        rng = torch.Generator().manual_seed(count)
        labels = torch.randint(CLASSES, (count,), generator=rng)
        section = self.config.task
        if self.of_text:
            ids = torch.randint(5, 1000, (count, section.max_tokens), generator=rng)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "label": labels}
        shape = count, 3, section.image_size, section.image_size
        image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
        return {"image": image, "label": labels}

    def example(self) -> Batch:
        """Return one row."""
        return {name: tensor for name, tensor in self.rows(1).items() if name != "label"}

    def partition(self, partition_id: int) -> Examples:
        """Return four batches."""
        return Examples.of(self.rows(4 * self.config.train.batch_size))

    def test_examples(self) -> Examples:
        """Return two batches."""
        return Examples.of(self.rows(2 * self.config.train.batch_size))

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return class scores."""
        if self.of_text:
            return TextTask.logits(cast(Any, self), model, batch)
        return cast(Tensor, model(batch["image"]))


class Texts(Rows):
    """Random texts."""

    reads: ClassVar[str] = "text"


def process_peak(device: torch.device) -> float:
    """Return the peak bytes of this process, or of the tensors on a GPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    # Not `getrusage`, which counts the peak of the parent process too.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return float(status.partition("VmHWM:")[2].split()[0]) * 1024


def graphs_compiled() -> int:
    """Return how many graphs `torch.compile` has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


class Clock:
    """Yields a batch again and again, and notes when it is asked for the next one."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self.batch, self.device, self.times = batch, device, list[float]()

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batch once a step, and once more before what is timed."""
        for _ in range(STEPS + 1):
            synchronize(self.device)
            self.times.append(time.perf_counter())
            yield self.batch
        synchronize(self.device)
        self.times.append(time.perf_counter())

    @property
    def steps(self) -> list[float]:
        """The seconds of each step; the first counts FLOPs and is left out."""
        return [later - sooner for sooner, later in itertools.pairwise(self.times[1:])]

    @property
    def longest(self) -> float:
        """The seconds of the longest step, the first one too."""
        return max(later - sooner for sooner, later in itertools.pairwise(self.times))

    @property
    def seconds(self) -> float:
        """The median of the steps."""
        return statistics.median(self.steps)


def plain_steps(
    task: Rows, model: nn.Module, clock: Clock, precision: str, compiled: bool
) -> tuple[float, float]:
    """Return seconds and FLOPs of a step as PyTorch's tutorials have it."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    flops = 0.0
    for number, batch in enumerate(clock):
        with TotalFlops() if number == 0 else torch.enable_grad() as counter:
            with autocast(clock.device, precision):
                loss = task.loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
        flops = flops or float(cast(TotalFlops, counter).total)
        optimizer.step()
        optimizer.zero_grad()
        if compiled and number == 0:
            # Not before: with torch 2.11 nothing was, probably since FLOPs are counted in a mode.
            model.compile()
    return clock.seconds, flops


def closed_form(
    task: Rows, model: nn.Module, layers: LayerMap, batch: Batch, mask: list[bool]
) -> float:
    """Return the least FLOPs of a step."""
    found, total = forward_flops(model, layers, batch, task.logits)
    chosen = layers.trained(mask)
    low = min(layers.names.index(name) for name in chosen)
    above = sum(found[name] for name in layers.names[low + 1 :])
    return total + above + sum(found[name] for name in chosen)


def measured(method: str, settings: list[str], compiled: bool) -> dict[str, float]:
    """Measure one method in this process."""
    config = load_config(None, settings)
    device = choose_device(config.run.device)
    if method == "run":
        from layerfed.engine import run_on

        began = time.perf_counter()
        run_on("inprocess", config)
        return {"seconds": time.perf_counter() - began, "peak": process_peak(device)}
    task = cast(Rows, load_task(config))
    batch = {name: t.to(device) for name, t in task.rows(config.train.batch_size).items()}
    clock = Clock(batch, device)
    before = process_peak(device)
    optimizer: Callable[..., LocalSGD] = partial(LocalSGD, lr=1e-3)
    section = config.train
    how = Step(
        chosen_precision(section.precision, device), section.micro_batch, section.checkpointing
    )
    if method in ("plain", "lora"):
        model = task.build_model()
        kind = torch.float32 if method == "plain" else next(model.parameters()).dtype
        model = model.to(device, kind)
        if method == "lora":
            import peft

            adapters = peft.LoraConfig(r=16, target_modules="all-linear")
            model = cast(nn.Module, peft.get_peft_model(model, adapters))
            task.logits = partial(_through, task.logits)  # type: ignore[method-assign]
        seconds, flops = plain_steps(task, model.train(), clock, how.precision, compiled)
        return {
            "seconds": seconds,
            "longest": clock.longest,
            "flops": flops,
            "before": before,
            "peak": process_peak(device),
        }
    resident = ResidentModel(task.build_model, task.layers, device, config.model.storage)
    layers = resident.layers
    if method in PROBES:
        half, count = layers.num_blocks // 2, layers.num_blocks
        rows = {"probe": (0, count), "probe-upper": (half, count), "probe-lower": (0, half)}
        blocks = [rows[method][0] <= row < rows[method][1] for row in range(count)]
        norms = ["grad_norm_sq"]
        probe = partial(probe_layers, blocks=blocks, precision=how.precision)
        _, flops = probe(resident.model, layers, clock, task.loss, norms)
        flops /= STEPS + 1
        floor = 0.0
    else:
        names = {"head": "head only", "kept": "top"}
        count = layers.num_blocks
        masks = {**masks_named(count), "quarter": [i == count * 3 // 4 for i in range(count)]}
        mask = masks[names.get(method, method)]
        cache = PrefixCache(resident, 4e9) if method == "kept" else None
        floor = 0.0 if cache else closed_form(task, resident.model, layers, batch, mask)
        with resident.borrowed(layers.trained(mask)):
            train = partial(train_layers, resident.model, layers, mask, cache=cache, how=how)
            if cache or compiled:
                train([batch], task.loss, optimizer)
            for name in (name for block in layers.blocks if compiled for name in block.modules):
                resident.model.get_submodule(name).compile()
            result = train(clock, task.loss, optimizer)
        flops = result.flops / result.steps
    return {
        "seconds": clock.seconds,
        "longest": clock.longest,
        "flops": flops,
        "floor": floor,
        "before": before,
        "peak": process_peak(device),
    }


def _through(logits: Callable[[nn.Module, Batch], Tensor], model: Any, batch: Batch) -> Tensor:
    """Score with the model inside PEFT's wrapper, whose adapters are in it."""
    return logits(model.base_model.model, batch)


def settings_of(
    shape: Shape, storage: str, device: str, folder: Path, further: Sequence[str]
) -> list[str]:
    """Return the settings of a shape's run; a checkpoint is written if the shape has one."""
    weights, name = "random", shape.model
    if shape.config is not None:
        import transformers

        family, fields = shape.config
        name = f"transformers/{folder}"
        found = transformers.AutoConfig.for_model(family, **fields)
        if shape.saved:
            weights = str(folder)
            if not (folder / "model.safetensors").exists():
                with torch.device(device):
                    kind = transformers.AutoModelForCausalLM
                    kind.from_config(found, dtype=torch.bfloat16).save_pretrained(folder)
                if device != "cpu":
                    torch.cuda.empty_cache()
        else:
            found.save_pretrained(folder)
    if shape.model == "layerfed/vit":
        weights = "embedded"
    length = f"task.max-tokens={shape.size}" if shape.config else f"task.image-size={shape.size}"
    return [
        f"task.name=benchmarks.training:{'Texts' if shape.config else 'Rows'}",
        length,
        f"model.name={name}",
        f"model.weights={weights}",
        f"model.storage={storage}",
        f"train.batch-size={shape.batch}",
        f"run.evaluate-batch={shape.batch}",
        f"run.device={device}",
        f"run.dir={folder / 'runs'}",
        "strategy.name=top",
        "train.local-steps=2",
        "federation.rounds=2",
        "federation.clients=2",
        "federation.clients-per-round=2",
        "run.checkpoint-every=0",
        *further,
    ]


def named(asked: str, known: tuple[str, ...], option: str) -> list[str]:
    """Return the names in a list, and refuse unknown ones."""
    names = [name.strip() for name in asked.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"{option} {unknown[0]} is unknown; choose of {', '.join(known)}")
    return names


def main(
    shapes: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "vit",
    methods: Annotated[str, typer.Option(help=", ".join(METHODS))] = ",".join(METHODS[:-1]),
    storage: Annotated[str, typer.Option(help="model.storage, several")] = "checkpoint",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="keep written checkpoints here for the next time")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="with torch.compile")] = False,
    further: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...")] = None,
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure, print a table, and write it as JSON."""
    if child:
        found = measured(methods, json.loads(child), compiled)
        print("\n" + json.dumps(found | ({"graphs": graphs_compiled()} if compiled else {})))
        return
    with one_line_errors(ConfigError):
        wanted = named(shapes, tuple(SHAPES), "--shapes")
        ways = named(methods, METHODS, "--methods")
        kinds = named(storage, get_args(Storage), "--storage")
        if any(SHAPES[name].gpu for name in wanted) and device == "cpu":
            raise ConfigError("--shapes llama-7b needs --device cuda")
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        beside = tempfile.TemporaryDirectory(prefix="layerfed-training-")
        root = folder or Path(stack.enter_context(beside))
        for name, kind in itertools.product(wanted, kinds):
            settings = settings_of(SHAPES[name], kind, device, root / name, further or ())
            for way in ways:
                program = sys.executable, "-m", "benchmarks.training"
                done = subprocess.run(
                    [
                        *(*program, "--methods", way, "--child", json.dumps(settings)),
                        *(["--compile"] if compiled else []),
                    ],
                    env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0"},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                row: dict[str, Any] = {"shape": name, "method": way, "storage": kind}
                row["compiled"] = compiled
                if done.returncode:
                    row["error"] = done.stderr.strip().splitlines()[-1]
                else:
                    row |= json.loads(done.stdout.splitlines()[-1])
                rows.append(row)
                if json_file:
                    json_file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print_table(rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print what was measured; the floor's seconds need `plain` of the same shape."""
    speed = {
        row["shape"]: row["flops"] / row["seconds"]
        for row in rows
        if row["method"] == "plain" and "flops" in row
    }
    table = Table("shape", "storage", "trained", "s a step", "x floor", "GFLOPs", "floor")
    for column in ("peak MB", "rise MB", "longest s", "graphs"):
        table.add_column(column, justify="right")
    for row in rows:
        if "error" in row:
            table.add_row(row["shape"], row["storage"], row["method"], row["error"])
            continue
        floor, seconds = row.get("floor", 0.0), row["seconds"]
        times = seconds * speed[row["shape"]] / floor if floor and row["shape"] in speed else 0.0
        numbers = (
            f"{seconds:.3f}",
            f"{times:.2f}" if times else "",
            f"{row.get('flops', 0.0) / 1e9:.2f}",
            f"{floor / 1e9:.2f}" if floor else "",
            f"{row['peak'] / 1e6:.0f}",
            f"{(row['peak'] - row['before']) / 1e6:.0f}" if "before" in row else "",
            f"{row['longest']:.1f}" if row["compiled"] and "longest" in row else "",
            str(row.get("graphs", "")),
        )
        table.add_row(row["shape"], row["storage"], row["method"], *numbers)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
