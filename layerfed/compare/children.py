"""The processes of a comparison: a limited number at a time, each with a log, all ended with it."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar, cast

from layerfed.config import ConfigError
from layerfed.runs.signals import undisturbed

__all__ = ["Ended", "Job", "alone_in", "run_jobs"]

T = TypeVar("T")

SERVER = multiprocessing.get_context("forkserver")
# What takes a run's start-up most of its seconds. None of it computes or opens a device when imported: a
# fork of a process with CUDA or busy threads would hang.
IMPORTED = [
    "layerfed.engine",
    "layerfed.report",
    "layerfed.deploy.cli",
    "layerfed.config.command_line",
]
# The seconds that a run gets to finish its folder after SIGTERM, which `layerfed run` treats as Ctrl-C.
# A run ignores SIGINT if the comparison was started in the background of a script.
GRACE_SECONDS = 20.0


@dataclass(frozen=True)
class Job(Generic[T]):
    """A Python module to run in a process, as `python -m` does.

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

    A job is a fork of a server that has imported what all jobs import, and has done nothing else. So it
    starts at once, and is a process of its own: it shares no state with other jobs, and its crash ends
    no other. If this function ends early, for example by Ctrl-C, it ends the running jobs by process id:
    with SIGTERM first, then with SIGKILL.

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
    SERVER.set_forkserver_preload(IMPORTED)
    waiting = iter(jobs)
    running: dict[int, tuple[Job[T], ForkServerProcess]] = {}
    try:
        while True:
            while len(running) < abreast and (job := next(waiting, None)) is not None:
                process = _start(job, lock)
                running[process.sentinel] = job, process
            if not running:
                return
            for sentinel in wait(list(running)):
                job, process = running.pop(cast(int, sentinel))
                process.join()
                ended(Ended(job, _error(job, process.exitcode or 0)))
    finally:
        with undisturbed():
            _stop([process for _, process in running.values()])


class _Inherited:
    """A descriptor that a job gets with its arguments, under a number of its own."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[type, tuple[object]]:
        return _Inherited, (reduction.DupFd(self._descriptor),)


def _start(job: Job[T], lock: int) -> ForkServerProcess:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    process = SERVER.Process(target=_work, args=(job.arguments, job.log, _Inherited(lock)))
    # A job does not import the program that started the comparison.
    program = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        process.start()
    finally:
        sys.modules["__main__"] = program
    return process


def _work(arguments: Sequence[str], log: Path, lock: _Inherited) -> None:
    """Do what `python -m` does, with all output in the log; called in the job's process."""
    # Each job has its own session, so that a Ctrl-C in the terminal reaches it only through `_stop`.
    os.setsid()
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Libraries that start processes do it as in any other program.
    multiprocessing.set_start_method(None, force=True)
    sys.argv = list(arguments)
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    finally:
        # A fork ends without them.
        atexit._run_exitfuncs()


def _stop(processes: Sequence[ForkServerProcess]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
        if process.is_alive():
            # It leads its own process group, unless it has ended since.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(cast(int, process.pid), signal.SIGKILL)
            process.join()


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
