"""Samples of processes' memory, descriptors and threads, and their growth."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

__all__ = ["Usage", "command", "descendants", "disk", "growth", "of_processes"]


@dataclass(frozen=True)
class Usage:
    """The usage of one process or of several together: bytes, open descriptors, threads.

    Bytes are resident and private. Shared memory does not count: Ray's object store fills up with use.
    """

    memory: int = 0
    descriptors: int = 0
    threads: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def of_processes(pids: Iterable[int]) -> Usage:
    """Return the usage of processes together; a process that has just ended counts as 0."""
    total = Usage()
    for pid in pids:
        with suppress(OSError):
            status = dict(
                line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            )
            total += Usage(
                memory=int(status.get("RssAnon", "0").split()[0]) * 1024,
                descriptors=len(os.listdir(f"/proc/{pid}/fd")),
                threads=int(status["Threads"]),
            )
    return total


def descendants(root: int) -> list[int]:
    """Return a process's descendants, without itself."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            # State and parent come after the name, which is in parentheses and may hold any character.
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(folder.name))
    found, unseen = list[int](), [root]
    while unseen:
        unseen = [child for pid in unseen for child in children.get(pid, ())]
        found += unseen
    return found


def command(pid: int) -> str:
    """Return a process's command line; empty if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def disk(folder: Path) -> tuple[int, int]:
    """Return the number of files below a folder and their bytes."""
    count, size = 0, 0
    for place, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):
                size += os.stat(os.path.join(place, name)).st_size
                count += 1
    return count, size


def growth(values: Sequence[float], warm_up: int) -> float:
    """Return the growth in each round: the slope of a least-squares line after the warm-up."""
    rest = np.asarray(values[warm_up:], dtype=np.float64)
    if len(rest) < 2:
        return float("nan")
    return float(np.polyfit(np.arange(len(rest)), rest, 1)[0])
