"""The processes of a comparison: a limited number at a time, each with a log, all ended with it."""

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
from layerfed.runs.signals import undisturbed

__all__ = ["Ended", "Job", "alone_in", "run_jobs"]

T = TypeVar("T")

POLL_SECONDS = 0.1
# The seconds that a run gets to finish its folder after SIGTERM, which `layerfed run` treats as Ctrl-C.
# A run ignores SIGINT if the comparison was started in the background of a script.
GRACE_SECONDS = 20.0


@dataclass(frozen=True)
class Job(Generic[T]):
    """A Python module to run in a process.

    Attributes
    ----------
    what : T
        The object that the job is for.
    arguments : Sequence[str]
        The command line after `python -m`.
    log : Path
        The file for the job's output.
    """

    what: T
    arguments: Sequence[str]
    log: Path


@dataclass(frozen=True)
class Ended(Generic[T]):
    """The end of a job.

    Attributes
    ----------
    job : Job
    error : str
        The error in one line; empty if the job succeeded.
    """

    job: Job[T]
    error: str = ""


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[int]:
    """Lock a folder for this comparison and yield the lock's descriptor.

    Processes that inherit the descriptor hold the lock too. If a comparison is killed and its runs live
    on, another comparison does not touch their folders.

    Raises
    ------
    ConfigError
        If another comparison works in the folder, or the folder cannot be written.
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
    """Run jobs, a limited number at a time, and report each one's end at once.

    If this function ends early, for example by Ctrl-C, it ends the running jobs by process id: with
    SIGTERM first, then with SIGKILL.

    Parameters
    ----------
    jobs : Iterable[Job]
    abreast : int
        The number of jobs at a time.
    ended : Callable[[Ended], None]
        Called with the end of each job.
    lock : int
        The descriptor that the jobs inherit.
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
        # Each job has its own session, so that a Ctrl-C in the terminal reaches it only through `_stop`.
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
            # It leads its own process group, which exists until the process has been waited for.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _error(job: Job[T], status: int) -> str:
    """Return a job's error in one line: its last line of output, or its exit status."""
    if status == 0:
        return ""
    lines = [line.strip() for line in job.log.read_text(errors="replace").splitlines()]
    said = [line for line in lines if line.startswith(("error:", "failed:"))]
    last = (said or [line for line in lines if line] or [""])[-1]
    text = last.partition(":")[2].strip() if said else last
    if status < 0:
        return f"killed by {signal.Signals(-status).name}; its log: {job.log}"
    return text if said else f"{text or f'exit status {status}'}; its log: {job.log}"
