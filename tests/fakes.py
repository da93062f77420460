"""Grids that replace Flower's: one that plays its nodes, and one that records its messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from layerfed.client_app import client_app
from layerfed.config import RunConfig, Scalar
from layerfed.engine import InProcessGrid
from layerfed.flower_compat import stamp


class PlayedGrid(Grid):
    """A grid whose nodes exist only as `answer`, which is called when a reply is pulled.

    Attributes
    ----------
    asked : list[Message]
        Every message, in the order of sending.
    """

    def __init__(self, nodes: Iterable[int] = ()) -> None:
        self.nodes = list(nodes)
        self.asked: list[Message] = []
        self.waiting: dict[str, Message] = {}

    def answer(self, message: Message) -> Message | None:
        """Return a node's reply, or None if there is none yet."""
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        identities = []
        for message in messages:
            identity = f"m{len(self.asked)}"
            stamp(message, message_id=identity)
            self.asked.append(message)
            self.waiting[identity] = message
            identities.append(identity)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = []
        for identity in [i for i in message_ids if i in self.waiting]:
            asked = self.waiting.pop(identity)
            if (reply := self.answer(asked)) is None:
                self.waiting[identity] = asked
            else:
                replies.append(reply)
        return replies

    def set_run(self, run: Any) -> None: ...

    def run(self) -> Any: ...  # type: ignore[override]

    def create_message(self, *args: Any, **kwargs: Any) -> Any: ...

    def send_and_receive(self, *args: Any, **kwargs: Any) -> Any: ...


class Recorded(InProcessGrid):
    """A grid with real clients in this process, which keeps every instruction and every reply."""

    def __init__(
        self,
        config: RunConfig,
        app: ClientApp = client_app,
        nodes: Sequence[Mapping[str, Scalar]] = (),
    ) -> None:
        super().__init__(app, config.federation.clients, config.to_flat(), nodes)
        self.asked: dict[str, Message] = {}
        self.replies: list[tuple[Message, Message]] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        held = list(messages)
        identities = list(super().push_messages(held))
        self.asked.update(zip(identities, held, strict=True))
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        self.replies += [(self.asked[r.metadata.reply_to_message_id], r) for r in replies]
        return replies

    def kinds(self) -> list[tuple[int, str]]:
        """Round and type of every instruction but the first questions."""
        found = {
            (int(m.content.config_records["config"]["round"]), m.metadata.message_type)
            for m in self.asked.values()
        }
        return sorted(f for f in found if f[1] != "query.describe")

    def trained(self) -> list[tuple[Message, Message]]:
        """Every training instruction that was answered, with its reply."""
        return [(m, r) for m, r in self.replies if m.metadata.message_type == "train"]
