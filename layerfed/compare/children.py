"""Processes of a comparison: a few at a time, each with a log, and none left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from layerfed.config import ConfigError
from layerfed.signals import undisturbed

__all__ = ["Ended", "Job", "alone_in", "run_jobs"]

T = TypeVar("T")

POLL_SECONDS = 0.1
# What a run gets to put its folder in order after SIGTERM, which `layerfed run` takes as Ctrl-C. A
# SIGINT would be lost on it where the comparison was started in the background of a script.
GRACE_SECONDS = 20.0


@dataclass(frozen=True)
class Job(Generic[T]):
    """A module of Python to run, for something.

    Attributes
    ----------
    what : T
    arguments : Sequence[str]
        After `python -m`.
    log : Path
        What it writes goes there.
    """

    what: T
    arguments: Sequence[str]
    log: Path


@dataclass(frozen=True)
class Ended(Generic[T]):
    """How a job ended.

    Attributes
    ----------
    job : Job
    error : str
        One line; empty where it succeeded.
    """

    job: Job[T]
    error: str = ""


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[int]:
    """Hold a folder for this comparison; yield the descriptor of its lock.

    Processes that inherit the descriptor hold the folder too: where a comparison was killed and its runs
    live on, another one does not touch their folders.

    Raises
    ------
    ConfigError
        If another comparison is at work there, or the folder cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"--dir {directory} cannot be written: {error.strerror}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another comparison, or a run that one left behind, is at work in {directory}; wait "
                "for it, or take another --dir"
            ) from None
        yield lock
    finally:
        os.close(lock)


def run_jobs(
    jobs: Iterable[Job[T]], abreast: int, ended: Callable[[Ended[T]], None], lock: int
) -> None:
    """Run jobs, so many at a time, and tell how each ended as soon as it has.

    Whatever ends this early, Ctrl-C above all, ends the jobs that run: a SIGTERM first, then a kill, by
    process id.

    Parameters
    ----------
    jobs : Iterable[Job]
    abreast : int
    ended : Callable[[Ended], None]
    lock : int
        Descriptor that they inherit.
    """
    waiting = iter(jobs)
    running: list[tuple[Job[T], subprocess.Popen[bytes]]] = []
    try:
        while True:
            while len(running) < abreast and (job := next(waiting, None)) is not None:
                running.append((job, _start(job, lock)))
            if not running:
                return
            time.sleep(POLL_SECONDS)
            for job, process in list(running):
                if process.poll() is not None:
                    running.remove((job, process))
                    ended(Ended(job, _error(job, process.returncode)))
    finally:
        with undisturbed():
            _stop([process for _, process in running])


def _start(job: Job[T], lock: int) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        # A session of its own: a Ctrl-C in the terminal reaches it only through `_stop`.
        return subprocess.Popen(
            [sys.executable, "-m", *job.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            # It leads a group of its own, which is there as long as it has not been waited for.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _error(job: Job[T], status: int) -> str:
    """Return a job's error in one line: what it said last, or how it ended."""
    if status == 0:
        return ""
    lines = [line.strip() for line in job.log.read_text(errors="replace").splitlines()]
    said = [line for line in lines if line.startswith(("error:", "failed:"))]
    last = (said or [line for line in lines if line] or [""])[-1]
    text = last.partition(":")[2].strip() if said else last
    if status < 0:
        return f"killed by {signal.Signals(-status).name}; its log: {job.log}"
    return text if said else f"{text or f'exit status {status}'}; its log: {job.log}"
