"""A node's own process: it keeps model, data and layer store between messages.

`layerfed deploy supernode` starts the SuperNode through this module:

    python -m layerfed.deploy.node_process [--free-after SECONDS] -- flower-supernode …

The process that was started becomes the SuperNode. Before that it starts a keeper, which holds the
socket and starts the process that answers. If that process is killed, the message that it works on
fails, and the next one waits at the socket until another process accepts it. Both processes end with
the SuperNode.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flwr.clientapp.typing import ClientAppCallable

__all__ = ["command", "main", "serve"]

POLL_SECONDS = 0.2
# Ends in a row, each within so many seconds of its start, after which no process is started any more.
ENDS, AT_LEAST_SECONDS = 5, 10.0
# Bytes that the name of a Unix socket may take.
LONGEST_NAME = 100


def command(supernode: Sequence[str], free_after: float = 0.0) -> list[str]:
    """Return a SuperNode's command such that the node keeps its model between messages.

    Parameters
    ----------
    supernode : Sequence[str]
        The command of the SuperNode.
    free_after : float
        Seconds without a message after which memory is freed, that of a GPU too; 0 for never.
    """
    own = [sys.executable, "-m", __name__, "--free-after", f"{free_after:g}"]
    return [*own, "--", *supernode]


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the keeper, and become the SuperNode."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--free-after", type=float, default=0.0)
    parser.add_argument("supernode", nargs="+")
    asked = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="layerfed-"))  # 0700
    if len(os.fsencode(folder)) > LONGEST_NAME:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="layerfed-", dir="/tmp"))
    from layerfed.node_app import NODE, SECRET

    descriptor = os.open(folder / SECRET, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(secrets.token_bytes(32))
    parent = os.getpid()
    if os.fork() == 0:
        status = 1
        try:
            os.setsid()  # Ctrl-C is for the SuperNode, with which the keeper ends
            status = _keep(folder, parent, asked.free_after)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(status)
    os.environ[NODE] = str(folder)
    os.execvp(asked.supernode[0], asked.supernode)


def _keep(folder: Path, parent: int, free_after: float) -> int:
    """Hold the socket, and start a process that answers if there is none, until the parent ends."""
    from layerfed.node_app import SECRET, SOCKET

    def ended(*_: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, ended)
    with Listener(str(folder / SOCKET), "AF_UNIX", 16, (folder / SECRET).read_bytes()) as listener:
        os.chmod(folder / SOCKET, 0o600)
        early, worker = 0, 0
        try:
            while os.getppid() == parent:
                if not worker:
                    started, worker = time.monotonic(), _start(listener, free_after)
                time.sleep(POLL_SECONDS)
                done, status = os.waitpid(worker, os.WNOHANG)
                if done:
                    worker = 0
                    soon = status and time.monotonic() - started < AT_LEAST_SECONDS
                    early = early + 1 if soon else 0
                    if early == ENDS:
                        _say(f"ended {ENDS} times at once; now each message loads model and data")
                        return 1
                    if status:
                        _say("ended, and another one takes its place")
        finally:
            if worker:
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
    return 0


def _start(listener: Listener, free_after: float) -> int:
    """Start a process that answers; return its id."""
    keeper = os.getpid()
    if worker := os.fork():
        return worker
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        threading.Thread(target=_end_with, args=(keeper,), daemon=True).start()
        from layerfed.client.workbench import forget_workbenches
        from layerfed.client_app import client_app

        serve(listener, client_app, forget_workbenches, free_after)
        status = 0
    finally:
        os._exit(status)


def serve(
    listener: Listener, app: ClientAppCallable, forget: Callable[[], None], free_after: float = 0.0
) -> None:
    """Answer one message after another, for ever.

    Parameters
    ----------
    listener : multiprocessing.connection.Listener
    app : ClientApp
    forget : Callable[[], None]
        Frees what the app keeps of a run; called when another run's message comes.
    free_after : float
        Seconds without a message after which this process ends, if it has answered any; 0 for never.
        Only its end frees all memory of a GPU.
    """
    from layerfed.node_app import code_digest

    code, run, busy = code_digest(), None, threading.Lock()

    def free() -> None:
        if busy.acquire(blocking=False):
            os._exit(0)

    while True:
        idle = threading.Timer(free_after, free)
        if free_after and run is not None:
            idle.start()
        try:
            connection = listener.accept()
        except (AuthenticationError, EOFError, ConnectionError) as error:
            _say(f"turned a caller away: {error!r}")
            continue
        finally:
            idle.cancel()
        with busy, connection, suppress(EOFError, ConnectionError):
            _refuse_other_users(connection)
            theirs = connection.recv_bytes(len(code)).decode()
            if theirs != code:
                connection.send_bytes(
                    f"its code is {code}, and the app's is {theirs}; install the app's version of "
                    "LayerFed on this node. Until then each message loads model and data".encode()
                )
                if run is not None:
                    os._exit(0)  # the app needs the memory itself
                continue
            connection.send_bytes(b"")
            run = _answer(connection, app, forget, run)


def _answer(
    connection: Connection, app: ClientAppCallable, forget: Callable[[], None], last: int | None
) -> int:
    """Answer one message; return its run."""
    from flwr.common.logger import log

    from layerfed.node_app import receive, send

    message, context = receive(connection)
    if context.run_id != last:
        forget()
        log(logging.INFO, "the node's process works for run %d", context.run_id)
    working = threading.Event()
    working.set()

    def watch() -> None:
        connection.poll(None)  # the app sends no more: it can only go
        if working.is_set():
            _say("stops working on a message, since the app that passed it has ended")
            os._exit(0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        reply, refusal = app(message, context), ""
    except Exception as error:  # the app raises it again
        log(logging.ERROR, "the ClientApp raised", exc_info=error)
        reply, refusal = None, f"{type(error).__name__}: {error}"
    working.clear()
    connection.send_bytes(refusal.encode())
    if reply is not None:
        send(connection, reply, context)
    watcher.join()  # the app closes the connection when it has the reply
    return context.run_id


def _refuse_other_users(connection: Connection) -> None:
    """Close a connection whose other end is another user's process; the system tells who it is."""
    if not hasattr(socket, "SO_PEERCRED"):
        return
    with socket.socket(fileno=os.dup(connection.fileno())) as peer:
        size = struct.calcsize("3i")
        _, user, _ = struct.unpack(
            "3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        )
    if user != os.getuid():
        raise ConnectionRefusedError(f"user {user}")


def _end_with(keeper: int) -> None:
    while os.getppid() == keeper:
        time.sleep(POLL_SECONDS)
    os._exit(0)


def _say(text: str) -> None:
    from flwr.common.logger import log

    log(logging.WARNING, "the node's process %s", text)


if __name__ == "__main__":
    main()
