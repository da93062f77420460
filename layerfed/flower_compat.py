"""All that this package does with Flower beyond its documented interface, each with its reason.

Written for flwr 1.42. A test for each, in `tests/test_flower_compat.py`, fails where a version differs.
Every process of a client imports this, so it imports nothing that Flower's messages do not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from flwr.app import Array, Message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SType
from flwr.supercore.exit import add_exit_handler
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
    "empty_run",
    "engine_of",
    "enter_run",
    "in_one_line",
    "passes_as_array",
    "stamp",
    "withdraw",
    "without_deprecation",
]

A = TypeVar("A", bound=type[Array])

# What a run's clients work on, by the class of the grid that the ServerApp is given. The first is this
# package's own; the second is not exported by Flower, and only made inside its simulation.
ENGINES = {"InProcessGrid": "inprocess", "InMemoryGrid": "ray"}


def enter_run() -> None:
    """Say that this process is the server of a run: outside of one, no message can be made."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1


def empty_run() -> Run:
    """Return what a grid states of the run of `enter_run`: Flower reads none of it back."""
    return Run.create_empty(1)


def stamp(message: Message, **fields: object) -> None:
    """Set fields of a message's metadata, as Flower's own grids do: a message has no id until then.

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
    """Let a subclass of `Array` travel as one: Flower reads objects back by the name of their class."""
    kind.__qualname__ = Array.__qualname__
    return kind


def engine_of(grid: Grid) -> str:
    """Return what the clients behind a grid run on: `inprocess`, `ray` or `superlink`."""
    return ENGINES.get(type(grid).__name__, "superlink")


def withdraw(grid: Grid, message_ids: Iterable[str]) -> bool:
    """Take back messages that no client has worked on; return whether the grid can do that.

    Flower's grids cannot: a client that is late goes on, and its reply has to be fetched and dropped.
    """
    take_back = getattr(grid, "withdraw", None)
    if take_back is not None:
        take_back(list(message_ids))
    return take_back is not None


@contextmanager
def without_deprecation() -> Iterator[None]:
    """Keep Flower's notes on deprecated entry points out of its log.

    `run_simulation` is one, in favour of `flwr run`: that starts a SuperLink which outlives the run, and
    here nothing may be left behind.
    """

    def quiet(record: logging.LogRecord) -> bool:
        return "DEPRECATED" not in record.getMessage()

    logging.getLogger("flwr").addFilter(quiet)
    try:
        yield
    finally:
        logging.getLogger("flwr").removeFilter(quiet)


def in_one_line(error: Exception) -> None:
    """Show an error that is about to reach Flower in one line of its log, without a traceback.

    It has to be raised all the same: only then does Flower's list of runs say that this one failed.
    """

    def shortened(record: logging.LogRecord) -> bool:
        if isinstance(record.exc_info, tuple) and record.exc_info[1] is error:
            record.msg, record.args, record.exc_info = f"error: {error}", (), None
        return not record.getMessage().startswith("Exit Code:")

    logging.getLogger("flwr").addFilter(shortened)
