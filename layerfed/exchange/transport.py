"""Sending messages and taking replies one by one, as they arrive."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

__all__ = ["exchange"]

# A fast round is not made to wait for a poll; a slow one does not poll often.
FIRST_WAIT, LONGEST_WAIT = 0.002, 0.1

Again = Callable[[int, Message], Message | None]


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    timeout: float,
    *,
    again: Again | None = None,
    late: set[str] | None = None,
) -> Iterator[tuple[int, Message | None]]:
    """Send messages and yield each node's reply as soon as it is there.

    Flower's own `send_and_receive` returns only when all replies are in, so it holds as many models as
    there are clients; here each reply can be folded in and dropped.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
    messages : Iterable[flwr.app.Message]
        At most one a node.
    timeout : float
        Seconds to wait, from the first message on.
    again : Callable[[int, Message], Message | None], optional
        Given a node and its reply; what it returns is sent to that node and awaited instead.
    late : set[str], optional
        Messages of earlier exchanges that nobody waits for any more: replies to them are fetched and
        dropped. Those that this exchange stops waiting for are added.

    Yields
    ------
    tuple[int, Message | None]
        The node that was asked and its reply. None for a node that gave none in time. An error made by
        Flower on a node's behalf carries another sender, hence the node that was *asked*.
    """
    late = set() if late is None else late
    waiting, unsent = _send(grid, list(messages))
    deadline, wait = time.monotonic() + timeout, FIRST_WAIT
    try:
        while waiting:
            replies = list(grid.pull_messages([*waiting, *late]))
            for position, reply in enumerate(replies):
                replies[position] = None  # type: ignore[call-overload]  # freed once the caller drops it
                late.discard(reply.metadata.reply_to_message_id)
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is None:
                    continue
                once_more = again(node, reply) if again is not None else None
                if once_more is None:
                    yield node, reply
                else:
                    sent, failed = _send(grid, [once_more])
                    waiting.update(sent)
                    unsent += failed
            if time.monotonic() > deadline:
                break
            wait = FIRST_WAIT if replies else min(wait * 1.5, LONGEST_WAIT)
            if waiting and not replies:
                time.sleep(wait)
        for node in [*waiting.values(), *unsent]:
            yield node, None
    finally:
        # Also where the caller has enough and asks for no more.
        withdraw = getattr(grid, "withdraw", None)
        if withdraw is None:
            late.update(waiting)
        else:
            withdraw(list(waiting))


def _send(grid: Grid, outbox: list[Message]) -> tuple[dict[str, int], list[int]]:
    """Send messages; return the node asked by message id, and the nodes that could not be asked."""
    accepted = {identity for identity in grid.push_messages(outbox) if identity}
    asked = {message.metadata.message_id: message.metadata.dst_node_id for message in outbox}
    return (
        {identity: node for identity, node in asked.items() if identity in accepted},
        [node for identity, node in asked.items() if identity not in accepted],
    )
