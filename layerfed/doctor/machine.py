"""Checks of this machine: Python and its packages, torch, GPUs, memory, disks and caches, Ray."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from layerfed.config import ConfigError
from layerfed.doctor.finding import Finding, size
from layerfed.exchange.store import user_cache

__all__ = ["disks", "gpus", "memory", "packages", "python", "ray", "torch_build"]

TESTED = ((3, 11), (3, 13))
# Bytes below which a run's first files may not fit, and below which a model of the hub may not.
LITTLE, MODEST = 1e9, 10e9
# Ray keeps layers here; it writes them to disk, slowly, where there is less.
SHARED, ENOUGH_SHARED = Path("/dev/shm"), 1e9


def python() -> Iterator[Finding]:
    """Compare Python's version with those that LayerFed is tested on."""
    here, text = sys.version_info[:2], f"Python {sys.version.split()[0]}, {sys.executable}"
    if TESTED[0] <= here <= TESTED[1]:
        yield Finding("python", text)
    else:
        oldest, newest = (".".join(map(str, pair)) for pair in TESTED)
        advice = f"if something fails, use a Python from {oldest} to {newest}"
        yield Finding("python", text, advice, "note")


def packages() -> Iterator[Finding]:
    """Look for installed packages that contradict each other's requirements, LayerFed's among them."""
    from uv import find_uv_bin  # a library of Flower's

    done = subprocess.run(
        [find_uv_bin(), "pip", "check", "--offline", "--no-config", "--python", sys.executable],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    clashes = [line for line in said if line.startswith("The package")]
    for line in clashes:
        yield Finding("packages", line, "install the version that is asked for", "wrong")
    if not clashes:
        yield Finding("packages", said[-1] if said else "compatible")


def torch_build() -> Iterator[Finding]:
    """State torch's version, what it was built for, and its threads."""
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    text = f"torch {torch.__version__} for {build}, {os.cpu_count()} cores"
    yield Finding("torch", text, numbers={"cores": os.cpu_count()})


def gpus() -> Iterator[Finding]:
    """Compute on each GPU, and state its memory and number formats."""
    import torch

    from layerfed.client.devices import chosen_precision

    if not torch.cuda.is_available():
        if torch.backends.mps.is_available():
            yield Finding("gpu", "Apple's GPU", "use it by run.device=mps", "note")
        elif Path("/proc/driver/nvidia/version").exists():
            build = torch.version.cuda
            why = f"built for CUDA {build}" if build else "a build for the CPU"
            yield Finding(
                "gpu",
                f"this machine has NVIDIA's driver, but torch, {why}, sees no GPU",
                "install a torch for the driver's CUDA (nvidia-smi shows it), and look at "
                "CUDA_VISIBLE_DEVICES",
                "wrong",
            )
        else:
            yield Finding("gpu", "none; clients work on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        free, total = torch.cuda.mem_get_info(device)
        about = torch.cuda.get_device_properties(device)
        text = f"{index}: {about.name}, {size(free)} of {size(total)} free"
        numbers = {"free_bytes": free, "total_bytes": total}
        try:
            values = torch.arange(64.0).view(8, 8)
            right = torch.equal((values.to(device) @ values.to(device)).cpu(), values @ values)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            advice = "run.device=cpu avoids it; another torch may support it"
            yield Finding("gpu", f"{text}: cannot compute: {reason}", advice, "wrong", numbers)
            continue
        if not right:
            yield Finding("gpu", f"{text}: computes wrongly", "do not use it", "wrong", numbers)
            continue
        fast = chosen_precision("auto", device)
        busy = free < total / 2
        advice = "another process holds half of its memory; nvidia-smi shows which" * busy
        said = f"{text}, train.precision=auto is {fast}"
        yield Finding("gpu", said, advice, "note" if busy else "ok", numbers)


def memory() -> Iterator[Finding]:
    """State the memory that is free here, also within a container."""
    import torch

    from layerfed.client.limits import free_memory

    try:
        free = free_memory(torch.device("cpu"))
    except ConfigError:
        advice = "give a node its budget as a number, not budget=auto"
        yield Finding("memory", "this system does not say what is free", advice, "note")
        return
    advice = "end other programs, or give the container more" if free < LITTLE else ""
    status = "wrong" if advice else "ok"
    yield Finding("memory", f"{size(free)} free", advice, status, {"free_bytes": free})  # type: ignore[arg-type]


def places() -> dict[str, tuple[Path, str]]:
    """Return the folders that runs write to, each with what to set for another one."""
    home = Path(os.environ.get("HF_HOME") or user_cache().parent / "huggingface")
    return {
        "run folders": (Path("runs"), "run.dir"),
        "temporary files": (Path(tempfile.gettempdir()), "TMPDIR"),
        "LayerFed's cache": (user_cache(), "XDG_CACHE_HOME"),
        "models of the hub": (Path(os.environ.get("HF_HUB_CACHE") or home / "hub"), "HF_HUB_CACHE"),
        "data sets": (
            Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets"),
            "HF_DATASETS_CACHE",
        ),
    }


def disks() -> Iterator[Finding]:
    """Look whether the folders that runs write to can be written and have room."""
    for name, (place, setting) in places().items():
        place = place.expanduser().absolute()
        there = next(p for p in (place, *place.parents) if p.exists())
        free = shutil.disk_usage(there).free
        numbers = {"path": str(place), "free_bytes": free}
        text = f"{name}: {place}, {size(free)} free"
        other = f"set {setting} to another folder"
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            yield Finding("disk", f"{text}, but cannot be written", other, "wrong", numbers)
        elif free < LITTLE:
            yield Finding("disk", text, f"make room, or {other}", "wrong", numbers)
        elif free < MODEST:
            advice = f"a foundation model takes gigabytes: make room, or {other}"
            yield Finding("disk", text, advice, "note", numbers)
        else:
            yield Finding("disk", text, numbers=numbers)


def ray() -> Iterator[Finding]:
    """Look for Ray, on which several clients work at a time, and the shared memory that it uses."""
    try:
        found = f"Ray {version('ray')}"
    except PackageNotFoundError:
        advice = 'pip install ".[simulation]" in the clone of LayerFed'
        text = "Ray is not installed: clients of a simulation work one at a time"
        yield Finding("ray", text, advice, "note")
        return
    shared = shutil.disk_usage(SHARED).free if SHARED.exists() else None
    if shared is not None and shared < ENOUGH_SHARED:
        text = f"{found}; {SHARED} has {size(shared)}, so Ray keeps layers on disk"
        yield Finding("ray", text, "docker run --shm-size=4g, for example", "note")
    else:
        yield Finding("ray", found)
