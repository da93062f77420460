"""Clients in this process, one after another."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, repeat
from logging import DEBUG
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.logger import log
from flwr.serverapp import Grid

from layerfed.config import Flat, Scalar
from layerfed.flower_compat import (
    SUPERLINK_NODE_ID,
    ErrorCode,
    Run,
    empty_run,
    enter_run,
    stamp,
)

__all__ = ["HERE", "InProcessGrid"]

# Server and clients of one machine share arrays by reference.
HERE = {"store": "memory"}


class InProcessGrid(Grid):
    """A Grid whose nodes are this process: clients work one after another, without serialisation.

    A client works when its reply is pulled, so there is never more than one reply in memory.

    Parameters
    ----------
    client_app : flwr.clientapp.ClientApp
    num_supernodes : int
        The number of clients; node i holds partition i.
    run_config : Flat
        The run configuration in each client's context.
    nodes : Sequence[Mapping[str, Scalar]] (default: ())
        More settings for the first nodes, one entry for each, as in `flower-supernode --node-config`.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_supernodes: int,
        run_config: Flat,
        nodes: Sequence[Mapping[str, Scalar]] = (),
    ) -> None:
        enter_run()
        self._app = client_app
        self._run = empty_run()
        self._contexts = {
            SUPERLINK_NODE_ID + 1 + i: Context(
                run_id=1,
                node_id=SUPERLINK_NODE_ID + 1 + i,
                node_config={
                    "partition-id": i,
                    "num-partitions": num_supernodes,
                    **HERE,
                    **settings,
                },
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for i, settings in zip(range(num_supernodes), chain(nodes, repeat({})), strict=False)
        }
        self._queue: deque[Message] = deque()

    def set_run(self, run: Run) -> None:
        """Set the run this grid operates in."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid operates in."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message (Flower's deprecated way; use `Message`)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; return their ids."""
        identities = []
        for message in messages:
            identity = str(uuid4())
            stamp(message, message_id=identity)
            self._queue.append(message)
            identities.append(identity)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let the next asked client work and return its reply."""
        wanted = set(message_ids)
        for position, message in enumerate(self._queue):
            if message.metadata.message_id in wanted:
                del self._queue[position]
                return [self._work(message)]
        return []

    def withdraw(self, message_ids: Iterable[str]) -> None:
        """Withdraw messages that no client has worked on yet."""
        unwanted = set(message_ids)
        self._queue = deque(m for m in self._queue if m.metadata.message_id not in unwanted)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Let all asked clients work and return their replies."""
        wanted = list(self.push_messages(messages))
        return [reply for identity in wanted for reply in self.pull_messages([identity])]

    def _work(self, message: Message) -> Message:
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # every error of a client becomes that client's reply
            log(DEBUG, "a client raised", exc_info=error)
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
