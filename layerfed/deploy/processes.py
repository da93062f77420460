"""The processes of a rehearsal on one machine, which are watched and always stopped at its end.

Flower's processes start others, some in sessions of their own, and some outlive their parent. Stopping a
process here also stops its descendants, by process id, and no other process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from typing import Self

from layerfed.deploy.federation import DeploymentFailed
from layerfed.runs.signals import undisturbed

__all__ = ["Processes", "commands", "free_ports"]

POLL_SECONDS = 0.2
# Seconds for a process to end by itself after SIGTERM, and for its descendants after that.
GRACE_SECONDS = 15.0
LAST_LINES = 15


def free_ports(count: int) -> list[int]:
    """Return free loopback ports."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()


@dataclass(frozen=True)
class _Member:
    name: str
    process: subprocess.Popen[bytes]
    log: Path


class Processes:
    """A set of processes that ends with its context, after success, failure or Ctrl-C.

    Parameters
    ----------
    logs : Path
        Folder for the output of each process, `NAME.log`.
    """

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self._members: list[_Member] = []
        self._killed: set[int] = set()
        self._orphans: set[_Entry] = set()

    def __enter__(self) -> Self:
        """Begin."""
        self.logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop what still runs, last started first."""
        with undisturbed():
            while self._members:
                self._stop(self._members.pop())
            _end(self._orphans)

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own, so that Ctrl-C reaches it only through this class."""
        log = self.logs / f"{name}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._members.append(_Member(name, process, log))
        return process

    def wait(self, what: str, ready: Callable[[], bool], timeout: float) -> None:
        """Wait until `ready` returns True.

        Raises
        ------
        DeploymentFailed
            If a process ends first, or `timeout` seconds pass.
        """
        deadline = time.monotonic() + timeout
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise DeploymentFailed(f"{what}: not after {timeout:g} s; logs are in {self.logs}")
            time.sleep(POLL_SECONDS)

    def check(self) -> None:
        """Raise `DeploymentFailed` if a process has ended, with the last lines of its log."""
        for member in self._members:
            status = member.process.poll()
            if status is not None and member.process.pid not in self._killed:
                lines = member.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
                raise DeploymentFailed(
                    f"{member.name} ended with status {status}:\n" + "\n".join(lines)
                )

    def signal(self, process: subprocess.Popen[bytes], number: Signals) -> None:
        """Send a signal to a process and its descendants, as if a machine died or hung."""
        _signal(_family(process.pid), number)

    def kill(self, process: subprocess.Popen[bytes], *, alone: bool = False) -> None:
        """Kill a process, with its descendants or alone; its end does not count as a failure."""
        self._killed.add(process.pid)
        family = _family(process.pid)
        if alone:
            self._orphans |= family  # their parent will be gone, so they are remembered here
            process.kill()
        else:
            _signal(family, signal.SIGKILL)
        process.wait(GRACE_SECONDS)

    def _stop(self, member: _Member) -> None:
        pid = member.process.pid
        family = _family(pid)
        _signal(family, signal.SIGCONT)  # a paused process receives no other signal
        if member.process.poll() is None:
            member.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                member.process.wait(GRACE_SECONDS)
        # The remaining ones are workers in the middle of a task, and processes started meanwhile.
        _end(family | _family(pid))
        member.process.wait(GRACE_SECONDS)


@dataclass(frozen=True)
class _Entry:
    """A living process, with its start time, since process ids are reused."""

    pid: int
    parent: int = field(compare=False)  # an orphan gets a new parent and stays the same process
    group: int = field(compare=False)
    started: str


def _table() -> list[_Entry]:
    """Return every living process."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,pgid=,stat=,lstart="],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = (line.split(maxsplit=4) for line in listed.stdout.splitlines())
    return [
        _Entry(int(pid), int(parent), int(group), started)
        for pid, parent, group, state, started in rows
        if state[0] != "Z"
    ]


def commands(root: int) -> dict[int, str]:
    """Return the command lines of a process and its descendants, by process id."""
    family = {entry.pid for entry in _family(root)}
    listed = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,args="], capture_output=True, text=True, check=True
    )
    rows = (line.split(maxsplit=1) for line in listed.stdout.splitlines())
    return {int(pid): " ".join(command) for pid, *command in rows if int(pid) in family}


def _family(root: int) -> set[_Entry]:
    """Return the living members of a process's group and their descendants."""
    table = _table()
    found = {entry for entry in table if root in (entry.pid, entry.group)}
    while more := {e for e in table if e.parent in {f.pid for f in found}} - found:
        found |= more
    return found


def _end(family: set[_Entry]) -> None:
    """Ask processes to end, and kill those that do not."""
    family = family & set(_table())  # an id may belong to another process by now
    _signal(family, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while (family := family & set(_table())) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    _signal(family, signal.SIGKILL)


def _signal(family: Iterable[_Entry], number: Signals) -> None:
    for entry in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(entry.pid, number)
