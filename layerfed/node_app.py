"""The ClientApp that Flower starts: it passes each message to the node's own process, if there is one.

On real devices Flower starts a Python process for every message. This module imports nothing that Flower
has not imported already, so that a message costs little more than Flower's own start. The node's process
(`deploy/node_process.py`) keeps model, data and layer store, and answers over a Unix socket. Where there
is none, as in a simulation, the message is answered here, by `client_app.py`.

The socket is in a folder that only the node's user can open. Both sides prove that they know the secret
beside it (`multiprocessing.connection`). Messages pass in Flower's own serialisation, without pickle.
"""

from __future__ import annotations

import json
import os
from hashlib import blake2b
from logging import WARNING
from multiprocessing.connection import Client, Connection
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common.logger import log

from layerfed.flower_compat import (
    context_bytes,
    context_from,
    enter_task,
    message_from,
    objects_of,
    task_identity,
)

__all__ = ["NODE", "SECRET", "SOCKET", "NodeFailed", "client_app", "code_digest", "receive", "send"]

# The folder of the node's process, in the environment of the SuperNode and of all that it starts.
NODE = "LAYERFED_NODE"
SOCKET, SECRET = "socket", "secret"
# How often a connection is tried whose other end goes before it answers, as if it had been killed.
ATTEMPTS = 3


class NodeFailed(RuntimeError):
    """Error for a message that the node's process could not answer; the message says what it raised."""


class NodeApp(ClientApp):
    """A ClientApp that lets the node's process answer, or else answers in this process."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message."""
        folder = os.environ.get(NODE)
        connection = _connect(Path(folder)) if folder else None
        if connection is None:
            from layerfed.client_app import client_app as whole

            return whole(message, context)
        with connection:
            return _answer(connection, message, context)


def _connect(folder: Path) -> Connection | None:
    """Return a connection to the node's process; None if there is none that can serve this app."""
    for _ in range(ATTEMPTS):
        try:
            connection = Client(str(folder / SOCKET), "AF_UNIX", (folder / SECRET).read_bytes())
        except (FileNotFoundError, ConnectionRefusedError):
            break  # it has ended for good
        except (EOFError, ConnectionError):
            continue  # it ended just now, and the next one waits at the same socket
        try:
            connection.send_bytes(code_digest().encode())
            if not (refusal := connection.recv_bytes().decode()):
                return connection
        except (EOFError, ConnectionError):
            connection.close()
            continue
        connection.close()
        log(WARNING, "the node's process refuses: %s", refusal)
        return None
    log(WARNING, "the node's process is gone; this message loads model and data by itself")
    return None


def _answer(connection: Connection, message: Message, context: Context) -> Message:
    try:
        send(connection, message, context)
        if refusal := connection.recv_bytes().decode():
            raise NodeFailed(refusal)
        reply, after = receive(connection)
    except (EOFError, ConnectionError):
        raise NodeFailed("the node's process ended during the message") from None
    context.state = after.state
    return reply


def code_digest() -> str:
    """Return a digest of this package's code, which app and node's process must share."""
    package, state = Path(__file__).parent, blake2b(digest_size=16)
    for file in sorted(package.rglob("*.py")):
        content = file.read_bytes()
        state.update(f"{file.relative_to(package).as_posix()}:{len(content)};".encode())
        state.update(content)
    return state.hexdigest()


def send(connection: Connection, message: Message, context: Context) -> None:
    """Send a message with the context that it is answered in."""
    objects = objects_of(message)
    header = {
        "task": task_identity(),
        "message": message.metadata.message_id,
        "objects": list(objects),
    }
    connection.send_bytes(json.dumps(header).encode())
    connection.send_bytes(context_bytes(context))
    while objects:
        # One by one, in the order of the header, so that what is sent is freed.
        connection.send_bytes(objects.pop(next(iter(objects))))


def receive(connection: Connection) -> tuple[Message, Context]:
    """Receive a message with its context; this process then works on the same task of Flower."""
    header = json.loads(connection.recv_bytes())
    enter_task(*header["task"])
    context = context_from(connection.recv_bytes())
    objects = {identity: connection.recv_bytes() for identity in header["objects"]}
    return message_from(objects, header["message"]), context


client_app = NodeApp()
