"""A node's process keeps model and data, and the app that Flower starts imports no torch."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, RecordDict

from layerfed import node_app
from layerfed.client.workbench import workbench
from layerfed.client_app import client_app
from layerfed.config import NodeConfig
from layerfed.deploy import node_process
from layerfed.deploy.processes import _table
from layerfed.exchange import Manifest, instruction
from layerfed.node_app import NODE, SECRET, SOCKET, NodeFailed
from tests.tiny_task import configured

ROOT = Path(__file__).parents[2]
# In place of a SuperNode: it tells the folder of the node's process, and stays until it is killed.
SUPERNODE = f"import os, time; print(os.environ[{NODE!r}], flush=True); time.sleep(600)"


@dataclass
class Started:
    """A SuperNode with its node's process."""

    supernode: subprocess.Popen[str]
    folder: Path

    def workers(self) -> list[int]:
        """Ids of the processes that answer: children of the keeper."""
        table = _table()
        keepers = {e.pid for e in table if e.parent == self.supernode.pid}
        return [e.pid for e in table if e.parent in keepers]


def start(free_after: float = 0.0) -> Started:
    command = node_process.command([sys.executable, "-c", SUPERNODE], free_after)
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=variables, cwd=ROOT, start_new_session=True
    )
    assert process.stdout is not None
    return Started(process, Path(process.stdout.readline().strip()))


def until(ready: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def started() -> Iterator[Started]:
    made = start()
    yield made
    made.supernode.kill()
    made.supernode.wait()
    until(lambda: not made.folder.exists())


@pytest.fixture
def node(started: Started, monkeypatch: pytest.MonkeyPatch) -> Started:
    """A node's process that the app of this process finds."""
    monkeypatch.setenv(NODE, str(started.folder))
    until((started.folder / SOCKET).exists)
    return started


SETTINGS = {"partition-id": 1, "num-partitions": 6, "store": "memory"}


def context(*overrides: str) -> Context:
    flat = configured("task.name=tests.node_tasks:Waiting", *overrides).to_flat()
    return Context(1, 7, dict(SETTINGS), RecordDict(), flat)


def training(flat: dict[str, object], mask: list[int] | None = None) -> Message:
    resident = workbench(flat, NodeConfig.read(SETTINGS)).resident  # type: ignore[arg-type]
    manifest = Manifest(
        resident.base, {n.name: resident._digest(n.name) for n in resident.layers.layers}
    )
    config = {"mask": mask or [0, 0, 1, 0], "lr": 0.1, "codec": "float32", "run": "x"}
    return instruction(
        "train",
        7,
        server_round=1,
        timeout=60,
        manifest=manifest,
        arrays=ArrayRecord(),
        config=config,
    )


# ------------------------------------------------------------------------------------- an answer
def test_a_reply_is_that_of_the_app_itself_to_the_bit(node: Started) -> None:
    ours, theirs = context(), context()
    message = training(ours.run_config)
    passed, direct = node_app.client_app(message, ours), client_app(message, theirs)
    assert passed.metadata.reply_to_message_id == direct.metadata.reply_to_message_id
    assert passed.metadata.message_type == "train"
    sent, expected = (m.content.array_records["arrays"] for m in (passed, direct))
    assert list(sent) == list(expected)
    for name in sent:
        np.testing.assert_array_equal(sent[name].numpy(), expected[name].numpy())


def test_the_app_that_passes_a_message_imports_no_torch(node: Started) -> None:
    script = (
        "import json, sys\n"
        "from flwr.app import ConfigRecord, Context, Message, RecordDict\n"
        "from layerfed.flower_compat import enter_task\n"
        "from layerfed.node_app import client_app\n"
        "flat, settings = json.loads(sys.argv[1])\n"
        "enter_task(5, 7, 9)\n"
        "asked = Message(RecordDict({'config': ConfigRecord({'round': 0})}), 7, 'query.describe')\n"
        "context = Context(5, 7, settings, RecordDict(), flat)\n"
        "reply = client_app(asked, context)\n"
        "metadata = reply.metadata\n"
        "heavy = {'torch', 'safetensors', 'layerfed.config', 'layerfed.exchange'} & set(sys.modules)\n"
        "print(json.dumps([metadata.run_id, reply.has_content(), len(context.state), *heavy]))\n"
    )
    settings = {**SETTINGS, "budget": 2}
    argument = json.dumps([context().run_config, settings])
    done = subprocess.run(
        [sys.executable, "-c", script, argument],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    # The context's state has the budget that the node computed, which its next process needs.
    assert json.loads(done.stdout.splitlines()[-1]) == [5, True, 1]


def test_what_the_app_raises_is_raised_where_the_message_came_from(node: Started) -> None:
    asked = context()
    message = training(asked.run_config, mask=[1, 0, 0])
    with pytest.raises(NodeFailed, match="mask"):
        node_app.client_app(message, asked)
    (before,) = node.workers()
    assert node_app.client_app(training(asked.run_config), asked).has_content()
    assert node.workers() == [before]


# --------------------------------------------------------------------------------------- the door
def test_only_the_nodes_user_gets_in_and_only_with_the_secret(node: Started) -> None:
    modes = [stat.S_IMODE(os.stat(p).st_mode) for p in (node.folder, *node.folder.iterdir())]
    assert modes == [0o700, 0o600, 0o600]
    until(node.workers)
    with pytest.raises(AuthenticationError):
        Client(str(node.folder / SOCKET), "AF_UNIX", b"guessed")
    assert node_app.client_app(training(context().run_config), context()).has_content()


def test_a_process_of_another_user_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = node_process.socket.socketpair()
    with node_process.Connection(ours.detach()) as connection, theirs:
        node_process._refuse_other_users(connection)
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(ConnectionRefusedError):
            node_process._refuse_other_users(connection)


def test_an_app_of_other_code_is_refused_and_answers_by_itself(
    node: Started, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(node_app, "code_digest", lambda: "0" * 32)
    monkeypatch.setattr("flwr.common.logger.FLOWER_LOGGER.propagate", True)
    asked = context()
    assert node_app.client_app(training(asked.run_config), asked).has_content()
    assert "the app's is " + "0" * 32 in caplog.text


@pytest.mark.parametrize("folder", [None, "nowhere"])
def test_without_a_process_the_app_answers_by_itself(
    folder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(NODE, raising=False)
    if folder:
        monkeypatch.setenv(NODE, str(tmp_path / folder))
    asked = context()
    assert node_app.client_app(training(asked.run_config), asked).has_content()


# ---------------------------------------------------------------------------------- its life
def test_a_killed_process_costs_its_message_and_another_one_answers_the_next(
    node: Started, tmp_path: Path
) -> None:
    flag, raised = tmp_path / "wait", []
    asked = context(f"task.data={flag}")
    message = training(asked.run_config)
    flag.touch()

    def ask() -> None:
        try:
            node_app.client_app(message, asked)
        except NodeFailed as error:
            raised.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    until(flag.with_suffix(".reached").exists)
    (worker,) = node.workers()
    os.kill(worker, signal.SIGKILL)
    thread.join()
    flag.unlink()
    assert raised == ["the node's process ended during the message"]
    assert node_app.client_app(message, asked).has_content()  # it waits for the new process
    (other,) = node.workers()
    assert other != worker


def test_work_ends_with_the_app_that_passed_the_message(node: Started, tmp_path: Path) -> None:
    flag = tmp_path / "wait"
    asked = context(f"task.data={flag}")
    message = training(asked.run_config)
    flag.touch()
    connection = node_app._connect(node.folder)
    assert connection is not None
    node_app.send(connection, message, asked)
    until(flag.with_suffix(".reached").exists)
    (worker,) = node.workers()
    connection.close()
    until(lambda: worker not in node.workers())


def test_an_idle_process_gives_way_to_one_that_holds_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = start(free_after=0.2)
    try:
        monkeypatch.setenv(NODE, str(other.folder))
        until((other.folder / SOCKET).exists)
        asked = context()
        (first,) = (until(other.workers), other.workers())[1]
        assert node_app.client_app(training(asked.run_config), asked).has_content()
        until(lambda: first not in other.workers())
        assert node_app.client_app(training(asked.run_config), asked).has_content()
    finally:
        other.supernode.kill()
        other.supernode.wait()
    # Keeper, process and folder end with the SuperNode, also with one that was killed.
    until(lambda: not other.folder.exists())
    assert not [e for e in _table() if e.group == other.supernode.pid]
    assert SECRET not in os.listdir(other.folder.parent)
