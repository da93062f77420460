"""Every started process is stopped: descendants, orphans, and those that ignore SIGTERM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from layerfed.deploy import processes
from layerfed.deploy.federation import DeploymentFailed
from layerfed.deploy.processes import Processes, commands, free_ports

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs ps")

# Each notes its process id; the second leaves its parent's session, the third ignores SIGTERM.
FAMILY = """
import os, signal, subprocess, sys, time
folder, role = sys.argv[1:]
if role == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f"{folder}/{role}.tmp", "w").write(str(os.getpid()))
os.rename(f"{folder}/{role}.tmp", f"{folder}/{role}.pid")
if role == "parent":
    code = open(f"{folder}/code").read()
    for name, detached in (("detached", True), ("stubborn", False)):
        subprocess.Popen(
            [sys.executable, "-c", code, folder, name], start_new_session=detached
        )
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 1.0)
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.05)


def until(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not (found := true()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def lives(pid: int) -> bool:
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout
    return bool(state.strip()) and not state.startswith("Z")


def start_family(running: Processes, folder: Path) -> dict[str, int]:
    (folder / "code").write_text(FAMILY)
    running.start("parent", [sys.executable, "-c", FAMILY, str(folder), "parent"], os.environ)
    roles = ("parent", "detached", "stubborn")
    assert until(lambda: all((folder / f"{role}.pid").exists() for role in roles))
    return {role: int((folder / f"{role}.pid").read_text()) for role in roles}


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_nothing_survives_its_context(tmp_path: Path, error: type[BaseException] | None) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with suppress(ValueError, KeyboardInterrupt), Processes(tmp_path / "logs") as running:
            pids = start_family(running, tmp_path)
            assert all(lives(pid) for pid in pids.values())
            if error is not None:
                raise error
        assert {role for role, pid in pids.items() if lives(pid)} == set()
        assert lives(bystander.pid)
    finally:
        bystander.kill()
        bystander.wait()


def test_a_child_outlives_its_killed_parent_but_not_the_context(tmp_path: Path) -> None:
    with Processes(tmp_path / "logs") as running:
        pids = start_family(running, tmp_path)
        os.kill(pids["parent"], signal.SIGKILL)
        assert until(lambda: not lives(pids["parent"]))
        assert lives(pids["stubborn"])
    assert not lives(pids["stubborn"])
    os.kill(
        pids["detached"], signal.SIGKILL
    )  # left its session and lost its parent: not ours to see


def test_what_was_killed_on_purpose_is_no_failure(tmp_path: Path) -> None:
    with Processes(tmp_path / "logs") as running:
        pids = start_family(running, tmp_path)
        (parent,) = (member.process for member in running._members)
        running.kill(parent)
        assert until(lambda: not any(lives(pid) for pid in pids.values()))
        running.check()


def test_what_a_process_killed_alone_leaves_is_stopped_in_the_end(tmp_path: Path) -> None:
    """This includes processes that left its session and could not be found afterwards."""
    with Processes(tmp_path / "logs") as running:
        pids = start_family(running, tmp_path)
        (parent,) = (member.process for member in running._members)
        assert set(commands(parent.pid)) == set(pids.values())
        assert commands(parent.pid)[pids["detached"]].endswith(f"{tmp_path} detached")
        running.kill(parent, alone=True)
        running.check()
        assert not lives(pids["parent"])
        assert lives(pids["detached"])
        assert lives(pids["stubborn"])
    assert not any(lives(pid) for pid in pids.values())


def test_waiting_ends_when_a_process_does_and_shows_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('the port is taken'); raise SystemExit(3)"]
    with Processes(tmp_path / "logs") as running:
        running.start("superlink", command, os.environ)
        with pytest.raises(
            DeploymentFailed, match=r"superlink ended with status 3:\nthe port is taken"
        ):
            running.wait("it answers", lambda: False, timeout=60)


def test_waiting_ends_in_time(tmp_path: Path) -> None:
    with (
        Processes(tmp_path / "logs") as running,
        pytest.raises(DeploymentFailed, match=r"it answers: not after 0\.1 s; logs are in"),
    ):
        running.wait("it answers", lambda: False, timeout=0.1)


def test_ports_are_free_and_different() -> None:
    assert len(set(free_ports(20))) == 20
