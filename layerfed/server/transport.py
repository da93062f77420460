"""Send messages and yield replies one by one, as they arrive."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import httpx
from flwr.app import Error, Message
from flwr.serverapp import Grid

from layerfed.exchange.arrays import printable
from layerfed.flower_compat import ErrorCode, waits, withdraw

__all__ = ["exchange"]

# Seconds between polls, which grow from the first to the last: a fast round does not wait for a poll,
# and a slow one does not poll often.
FIRST_WAIT, LONGEST_WAIT = 0.002, 0.1

Again = Callable[[Message], Message | None]


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    timeout: float,
    *,
    again: Again | None = None,
    late: dict[str, Message] | None = None,
    replied: Callable[[int, int], None] = lambda done, asked: None,
) -> Iterator[Message]:
    """Send messages and yield each node's reply as soon as it is there.

    Flower's own `send_and_receive` returns only after the last reply, so it holds one model for each
    client. Here each reply can be aggregated and freed.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
    messages : Iterable[flwr.app.Message]
        The messages, at most one for each node.
    timeout : float
        Seconds to wait, from the first message on.
    again : Callable[[Message], Message | None], optional
        Gets a reply. A message that it returns is sent to that node, and its reply replaces the first.
    late : dict[str, flwr.app.Message], optional
        Messages of earlier exchanges whose replies are no longer awaited, by id. Replies to them are
        fetched and dropped. Messages that this exchange stops waiting for are added.
    replied : Callable[[int, int], None]
        Called before each reply with the number of replies so far and that of the messages.

    Yields
    ------
    flwr.app.Message
        One reply for each message, whose source is the node that was *asked*: an error stands for a
        node that gave none in time, and for a reply that another node signed.
    """
    late = {} if late is None else late
    waiting, unsent = _send(grid, list(messages))
    asked_for = len(waiting) + len(unsent)
    deadline, wait = time.monotonic() + timeout, FIRST_WAIT
    try:
        while waiting:
            began, found = time.monotonic(), False
            for identity in [i for i, asked in late.items() if _pull(grid, i, asked)]:
                del late[identity]
            for identity, asked in list(waiting.items()):
                reply = _pull(grid, identity, asked)
                if reply is None:
                    continue
                found = True
                del waiting[identity]
                once_more = again(reply) if again is not None else None
                if once_more is None:
                    replied(asked_for - len(waiting) - len(unsent), asked_for)
                    yield reply
                else:
                    sent, failed = _send(grid, [once_more])
                    waiting.update(sent)
                    unsent += failed
                del reply  # freed before the next one is made
                if time.monotonic() > deadline:
                    break
            if time.monotonic() > deadline:
                break
            wait = FIRST_WAIT if found else min(wait * 1.5, LONGEST_WAIT)
            if waiting and not found and not waits(grid):
                # Polling itself takes time if the SuperLink is another process.
                time.sleep(max(wait, time.monotonic() - began))
        for asked in [*waiting.values(), *unsent]:
            yield _error("no reply in time", asked)
    finally:
        # This also runs if the caller has enough replies and asks for no more.
        if not withdraw(grid, waiting):
            late.update(waiting)


def _pull(grid: Grid, identity: str, asked: Message) -> Message | None:
    """Return the reply to one message, or an error in place of one that Flower cannot build.

    Replies are pulled one at a time, since Flower builds all replies of a pull before it returns any. A
    forged one would lose the others, which the SuperLink then counts as delivered. This also means that
    the SuperLink, and not the reply, says to which message a reply belongs.
    """
    try:
        reply = next(iter(grid.pull_messages([identity])), None)
    except httpx.HTTPError:  # not the reply, but the way to the SuperLink
        raise
    except Exception as error:
        # Building a forged reply raises nearly anything.
        return _error(f"a reply that cannot be read ({type(error).__name__}: {error})", asked)
    if reply is None or reply.metadata.src_node_id == asked.metadata.dst_node_id:
        return reply
    if reply.has_error():  # by Flower, on the node's behalf
        return _error(str(reply.error.reason), asked, reply.error.code)
    return _error(f"it was sent by node {reply.metadata.src_node_id}, which was not asked", asked)


def _error(reason: str, asked: Message, code: int = ErrorCode.MESSAGE_UNAVAILABLE) -> Message:
    return Message(Error(code, printable(reason)), reply_to=asked)


def _send(grid: Grid, outbox: list[Message]) -> tuple[dict[str, Message], list[Message]]:
    """Send messages; return the accepted ones by message id, and the others."""
    accepted = {identity for identity in grid.push_messages(outbox) if identity}
    asked = {message.metadata.message_id: message for message in outbox}
    return (
        {identity: message for identity, message in asked.items() if identity in accepted},
        [message for identity, message in asked.items() if identity not in accepted],
    )
