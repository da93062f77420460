"""Sending messages and taking replies one by one, as they arrive."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

__all__ = ["exchange"]

# A fast round is not made to wait for a poll; a slow one does not poll often.
FIRST_WAIT, LONGEST_WAIT = 0.002, 0.1


def exchange(
    grid: Grid, messages: Iterable[Message], timeout: float
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

    Yields
    ------
    tuple[int, Message | None]
        The node that was asked and its reply. None for a node that gave none in time. An error made by
        Flower on a node's behalf carries another sender, hence the node that was *asked*.
    """
    outbox = list(messages)
    sent = {identity for identity in grid.push_messages(outbox) if identity}
    asked = {message.metadata.message_id: message.metadata.dst_node_id for message in outbox}
    del outbox
    waiting = {identity: node for identity, node in asked.items() if identity in sent}
    deadline, wait = time.monotonic() + timeout, FIRST_WAIT
    while waiting:
        replies = list(grid.pull_messages(list(waiting)))
        for position, reply in enumerate(replies):
            replies[position] = None  # type: ignore[call-overload]  # freed once the caller drops it
            node = waiting.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                yield node, reply
        if time.monotonic() > deadline:
            break
        wait = FIRST_WAIT if replies else min(wait * 1.5, LONGEST_WAIT)
        if waiting and not replies:
            time.sleep(wait)
    for identity, node in asked.items():
        if identity in waiting or identity not in sent:
            yield node, None
