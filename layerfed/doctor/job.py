"""What a configuration will take here: its data, its model, and one measured step.

All of it happens in a process of its own, which can be stopped, and may use up the memory. That process
asks no network, and writes to copies of the caches, so the machine is as before.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from layerfed.config import ConfigError, RunConfig
from layerfed.config.errors import EXPECTED
from layerfed.doctor.finding import Finding, size
from layerfed.doctor.machine import places
from layerfed.exchange.store import user_cache

if TYPE_CHECKING:
    from layerfed.client.memory import Phases
    from layerfed.client.workbench import Workbench
    from layerfed.task import Task

__all__ = ["look", "predicted_by_mask", "storage_of", "tried"]


def tried(config: RunConfig, seconds: float) -> Iterator[Finding]:
    """Yield the findings of a configuration.

    Parameters
    ----------
    config : RunConfig
    seconds : float
        The most that all of it may take.
    """
    with tempfile.TemporaryDirectory(prefix="layerfed-doctor-") as folder:
        child = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env=_apart(Path(folder)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, said = child.communicate(json.dumps(config.absolute().to_flat()), timeout=seconds)
        except subprocess.TimeoutExpired:
            text = f"this configuration's step was not measured within {seconds:g} s"
            yield Finding("job", text, "allow more: --seconds", "wrong")
            return
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
    if child.returncode == -signal.SIGKILL:
        advice = "most likely for lack of memory: lower train.batch-size, or take a smaller model"
        yield Finding("job", "the system killed the process that tried it", advice, "wrong")
    elif child.returncode:
        last = (said.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        yield Finding("job", f"cannot be tried: {last}", "layerfed run shows more", "wrong")
    else:
        yield from (Finding(**found) for found in json.loads(out))


def _apart(folder: Path) -> dict[str, str]:
    """Return an environment in which caches are read where they are, and written in a folder."""
    known = places()
    data, copied = known["data sets"][0], folder / "datasets"
    if data.is_dir():
        shutil.copytree(data, copied, copy_function=os.symlink)
    else:
        copied.mkdir()
    return {
        **os.environ,
        "HF_DATASETS_CACHE": str(copied),
        "HF_HUB_CACHE": str(known["models of the hub"][0]),
        "TORCH_HOME": os.environ.get("TORCH_HOME") or str(user_cache().parent / "torch"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(folder),
    }


def _no_network(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse what leaves this machine, since some libraries would download what is missing."""
    place = arguments[1] if event == "socket.connect" else None
    if isinstance(place, tuple) and place[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError("the doctor asks no network")


def look(config: RunConfig) -> Iterator[Finding]:
    """Yield the findings of a configuration in this process, each as soon as it is known."""
    from layerfed.engine import choose_engine, outlook, prepare
    from layerfed.task import load_task
    from layerfed.task.overview import describe_data

    config, stage = config.simulated(), "data"
    try:
        task = load_task(config)
        held = describe_data(task, config.federation.population)
        counts = [client["examples"] for client in held["clients"]]
        yield Finding(
            "data",
            f"{len(counts)} clients with {min(counts):,} to {max(counts):,} examples each, "
            f"{held['test']['examples']:,} to test on",
            numbers={"clients": counts, "test": held["test"]["examples"]},
        )
        stage = "model"
        bench = prepare(config)
    except EXPECTED as error:
        offline = "the doctor downloads nothing; a run does, if it reaches the hub"
        advice = offline if "hf download" in str(error) else ""
        yield Finding(stage, str(error), advice, "wrong")
        return
    layers = bench.resident.layers
    yield Finding(
        "model",
        f"{config.model.name}, weights {config.model.weights}: "
        f"{sum(layer.elements for layer in layers.layers):,} parameters in {layers.num_blocks} blocks, "
        f"{size(bench.resident.nbytes)} on {bench.device}",
        numbers={"bytes": bench.resident.nbytes, "device": str(bench.device)},
    )
    ahead = outlook(config)
    yield from _memory(config, task, bench, ahead.needed)
    yield _bytes(config, bench)
    if ahead.abreast:
        engine, why = choose_engine(config, "auto")
        each = ahead.round_seconds / ahead.abreast
        yield Finding(
            "time",
            f"{ahead.step_seconds:.3g} s a step on all blocks, at most {each:.3g} s of clients' work a "
            f"round with {ahead.abreast} at a time; engine {engine}: {why}",
            numbers={**asdict(ahead), "needed": _finite(ahead.needed), "engine": engine},
        )
    yield _run_folder(config, bench)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _memory(config: RunConfig, task: Task, bench: Workbench, needed: float) -> Iterator[Finding]:
    from layerfed.client.limits import free_memory

    by_mask = {name: phases.peak for name, phases in predicted_by_mask(config, task).items()}
    masks = ", ".join(f"{name} {size(peak)}" for name, peak in by_mask.items())
    numbers = {"client_bytes": _finite(needed), "peak_bytes_by_mask": by_mask}
    if masks:
        yield Finding("memory", f"a step by what is trained, predicted: {masks}", numbers=numbers)
    try:
        free = free_memory(bench.device)
    except ConfigError:
        free = math.inf
    most = size(needed) if math.isfinite(needed) else "more than there is"
    text = f"a client that trains all blocks, measured: {most}; {size(free)} free on {bench.device}"
    if needed <= free:
        yield Finding("memory", text, numbers=numbers)
    else:
        advice = (
            "lower train.batch-size or set train.micro-batch, train.checkpointing=true or "
            "model.storage=bfloat16; a budget of few upper layers needs less"
        )
        yield Finding("memory", text, advice, "wrong", numbers)


def _bytes(config: RunConfig, bench: Workbench) -> Finding:
    from layerfed.exchange.codecs import codec_of
    from layerfed.strategies import options_of

    layers, state = bench.resident.layers, bench.resident.model.state_dict()

    def sent(layer: str, codec_name: str = config.exchange.codec, *, down: bool = False) -> int:
        codec = codec_of(codec_name, layers)
        parts = [
            codec.parts_of(name, np.broadcast_to(np.float32(0), state[name].shape))
            for name in (layers[layer].tensors if down else layers[layer].sent)
        ]
        return sum(
            math.prod(shape) * dtype.itemsize for part in parts for shape, dtype in part.values()
        )

    blocks = sorted((sent(block.name) for block in layers.blocks), reverse=True)
    budget = config.budget
    strategy, options = options_of(config)
    # `cyclic` is without bounds at first, and `random` may train several masks in a round.
    more = any(getattr(options, name, 0) for name in ("warmup_rounds", "resample_steps"))
    keeps = strategy.within_budget and not more
    if budget.unit == "layers" and budget.kind != "per-node" and keeps:
        blocks = blocks[: int(budget.layers if budget.kind == "identical" else budget.max)]
    up = sent("head") + sum(blocks)
    coded = config.exchange.downlink_codec
    changing = sum(sent(layer.name, coded, down=True) for layer in layers.layers[1:])
    cohort = config.federation.cohort
    return Finding(
        "bytes",
        f"a round: at most {size(up)} up from each of {cohort} clients, {size(up * cohort)} together; "
        f"at most {size(changing)} down to each, and none on one machine",
        numbers={"uplink_client": up, "uplink_round": up * cohort, "downlink_client": changing},
    )


def _run_folder(config: RunConfig, bench: Workbench) -> Finding:
    from layerfed.config import expanded

    place = expanded(config.run.dir or "runs").resolve()
    there = next(path for path in (place, *place.parents) if path.exists())
    # Checkpoints, the final and the best layers, and one that is being written.
    needed, free = (
        bench.resident.nbytes * (config.run.checkpoints + 3),
        shutil.disk_usage(there).free,
    )
    text = f"at most {size(needed)} in {place}, where {size(free)} are free"
    numbers = {"needed_bytes": needed, "free_bytes": free}
    if needed < free:
        return Finding("run folder", text, numbers=numbers)
    return Finding("run folder", text, "make room, or set run.dir", "wrong", numbers)


def predicted_by_mask(config: RunConfig, task: Task) -> dict[str, Phases]:
    """Return the memory of a training step by mask; empty for a task without an example.

    With `train.skip = "substack"` it is that of the first client's network; `random` may leave out none.
    """
    from layerfed.client.prediction import masks_named, predicted_step
    from layerfed.client.skipping import skipped
    from layerfed.client.training import Step
    from layerfed.client_app import local_optimizer
    from layerfed.server.skipping import Skipping

    train, storage = config.train, storage_of(config)
    batch = task.largest_batch(train.batch_size)
    if batch is None:
        return {}
    model = task.adapted(task.skeleton().to("meta"))
    layers = task.layers(model)
    how = Step("float32", train.micro_batch, train.checkpointing)
    runs = np.ones(layers.num_blocks, dtype=bool)
    if (skip := Skipping.of(train, layers)) is not None and skip.rule == "substack":
        runs = skip.runs(config.run.seed, 1, 0)
    found, masks = {}, masks_named(int(runs.sum()))
    for name, those in masks.items():
        mask = np.zeros(layers.num_blocks, dtype=bool)
        mask[runs] = those
        with skipped(model, layers, runs.tolist()):
            found[name] = predicted_step(
                *(model, layers, mask.tolist(), batch, task.loss),
                local_optimizer(train, train.lr, model, layers),
                how=how,
                storage=storage,
            )
    return found


def storage_of(config: RunConfig) -> str:
    """Return the type in which frozen layers will be held."""
    if config.model.storage != "checkpoint":
        return config.model.storage
    if config.model.family != "transformers":
        return "float32"
    from layerfed.models.text import type_of_weights

    return str(type_of_weights(config.model)).removeprefix("torch.")


if __name__ == "__main__":
    sys.addaudithook(_no_network)
    with redirect_stdout(sys.stderr):
        seen = [asdict(each) for each in look(RunConfig.from_flat(json.load(sys.stdin)))]
    print(json.dumps(seen))
