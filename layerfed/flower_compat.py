"""All uses of Flower beyond its documented interface, each with its reason.

They are written for flwr 1.42. Each has a test in `tests/test_flower_compat.py`, which fails if a
version differs. Every process of a client imports this module, so it imports nothing that Flower's
messages do not import too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from flwr.app import Array, Context, Message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SType
from flwr.common.serde import context_from_proto, context_to_proto
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.supercore.exit import add_exit_handler
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

if TYPE_CHECKING:
    from flwr.serverapp import Grid

__all__ = [
    "SUPERLINK_NODE_ID",
    "ErrorCode",
    "Run",
    "SType",
    "add_exit_handler",
    "context_bytes",
    "context_from",
    "empty_run",
    "engine_of",
    "enter_run",
    "enter_task",
    "in_one_line",
    "message_from",
    "objects_of",
    "passes_as_array",
    "stamp",
    "task_identity",
    "waits",
    "withdraw",
]

A = TypeVar("A", bound=type[Array])

# The engine of a run's clients, by the class of the ServerApp's grid. The first two are LayerFed's own.
# Flower does not export the third one; it exists only inside its simulation, which works on Ray.
ENGINES = {"InProcessGrid": "inprocess", "RayGrid": "ray", "InMemoryGrid": "ray"}


def enter_run() -> None:
    """Mark this process as the server of a run, since Flower makes messages only inside a run."""
    enter_task(1, SUPERLINK_NODE_ID, 1)


def enter_task(run: int, node: int, task: int) -> None:
    """Mark this process as one that works on a task of Flower; its messages bear these ids."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, node, task


def task_identity() -> tuple[int, int, int]:
    """Return the ids of run, node and task that this process works on."""
    return TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id


def objects_of(message: Message) -> dict[str, bytes]:
    """Return the objects in which Flower sends a message, by id; the last is the message itself."""
    return {identity: part.deflate() for identity, part in get_all_nested_objects(message).items()}


def message_from(objects: dict[str, bytes], message_id: str) -> Message:
    """Return the message of `objects_of`. The objects do not hold its id. `objects` is emptied."""
    message = inflate_object_from_contents(list(objects)[-1], objects)
    assert isinstance(message, Message)
    stamp(message, message_id=message_id)
    return message


def context_bytes(context: Context) -> bytes:
    """Return a context in Flower's serialisation."""
    return bytes(context_to_proto(context).SerializeToString())


def context_from(content: bytes) -> Context:
    """Return the context of `context_bytes`."""
    return context_from_proto(ContextProto.FromString(content))


def empty_run() -> Run:
    """Return the run that a grid of `enter_run` states; Flower reads none of its fields."""
    return Run.create_empty(1)


def stamp(message: Message, **fields: object) -> None:
    """Set fields of a message's metadata, such as its id, as Flower's own grids do.

    Raises
    ------
    AttributeError
        If metadata have no such field.
    """
    found = message.metadata.__dict__
    for name, value in fields.items():
        if f"_{name}" not in found:
            raise AttributeError(f"a message's metadata have no {name}")
        found[f"_{name}"] = value


def passes_as_array(kind: A) -> A:
    """Let a subclass of `Array` be sent as `Array`: Flower reads objects back by their class name."""
    kind.__qualname__ = Array.__qualname__
    return kind


def engine_of(grid: Grid) -> str:
    """Return the engine of the clients behind a grid: `inprocess`, `ray` or `superlink`."""
    return ENGINES.get(type(grid).__name__, "superlink")


def waits(grid: Grid) -> bool:
    """Return whether a grid's pull itself waits for a reply, so that the caller need not pause."""
    return bool(getattr(grid, "waits", False))


def withdraw(grid: Grid, message_ids: Iterable[str]) -> bool:
    """Withdraw messages that no client has worked on; return whether the grid can do that.

    Flower's grids cannot. A late client goes on there, and its reply must be fetched and dropped.
    """
    take_back = getattr(grid, "withdraw", None)
    if take_back is not None:
        take_back(list(message_ids))
    return take_back is not None


def in_one_line(error: Exception) -> None:
    """Make Flower's log show an error in one line, without a traceback.

    The error must still be raised, since only then does Flower's list of runs say that the run failed.
    """

    def shortened(record: logging.LogRecord) -> bool:
        if isinstance(record.exc_info, tuple) and record.exc_info[1] is error:
            record.msg, record.args, record.exc_info = f"error: {error}", (), None
        return not record.getMessage().startswith("Exit Code:")

    logging.getLogger("flwr").addFilter(shortened)
