"""What a round asks of its clients: a message each, with the layers that its node lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from logging import INFO
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.common.logger import log

from layerfed.exchange import (
    RefusedReply,
    check_reply,
    instruction,
    read_held,
    read_missing,
)
from layerfed.runs.records import RoundRecord
from layerfed.server.global_model import GlobalModel
from layerfed.server.holdings import Holdings

__all__ = ["Asking"]


class Asking:
    """Builds a round's messages, and those that have to be sent again.

    Parameters
    ----------
    number : int
        t, from 1.
    model : GlobalModel
        θ^t.
    nodes : Mapping[int, int]
        Node id of each client, by partition id.
    timeout : float
        Seconds that a message is worth answering.
    holdings : Holdings
        Which layers each node is known to hold; kept up to date.
    """

    def __init__(
        self,
        number: int,
        model: GlobalModel,
        nodes: Mapping[int, int],
        timeout: float,
        holdings: Holdings,
    ) -> None:
        self.record = RoundRecord(number)
        self._model = model
        self._nodes = nodes
        self._partitions = {node: partition for partition, node in nodes.items()}
        self._timeout = timeout
        self._holdings = holdings
        self._asked: dict[int, Message] = {}
        self._resent: set[tuple[int, str]] = set()

    def instructions(
        self, kind: str, clients: Sequence[int], configs: Sequence[Mapping[str, Any]]
    ) -> list[Message]:
        """Build one message a client, each with the layers that client is not known to hold."""
        manifest, changed = self._model.manifest(), self._model.changed
        # Clients that lack the same layers share one record, and all share the serialised tensors.
        payloads: dict[tuple[str, ...], ArrayRecord] = {}
        messages = []
        for client, config in zip(clients, configs, strict=True):
            node = self._nodes[client]
            lacking = self._holdings.lacks(node, manifest, changed)
            sent = () if self._holdings.shares(node) else lacking
            if sent not in payloads:
                payloads[sent] = self._model.payload(sent)
            traffic = self.record.ledger[client]
            traffic.down += self._model.bytes(lacking)
            traffic.moved_down += self._model.bytes(sent)
            message = instruction(
                kind,
                node,
                server_round=self.record.round,
                timeout=self._timeout,
                manifest=manifest,
                arrays=payloads[sent],
                **config,
            )
            self._asked[node] = message
            messages.append(message)
        return messages

    def again(self, node: int, reply: Message) -> Message | None:
        """Return the instruction with the layers that a reply says are missing, once a node and phase.

        A node that answered otherwise is done, and what it says it holds is noted. What cannot be read
        is refused where the reply is taken.
        """
        partition, asked = self._partitions.get(node), self._asked.get(node)
        if reply.has_error() or partition is None or asked is None:
            return None
        try:
            check_reply(reply, asked)
            missing = read_missing(reply, self._model.layers)
            held, store = read_held(reply)
            # Digests of nothing that exists are not worth keeping.
            known = set(self._model.manifest().digests.values())
            self._holdings.learn(node, known.intersection(held), store)
        except RefusedReply:
            return None
        kind = asked.metadata.message_type
        if not missing or (node, kind) in self._resent:
            return None
        self._resent.add((node, kind))
        log(
            INFO,
            "round %d: client %d lacks %s; sent again",
            self.record.round,
            partition,
            ", ".join(missing),
        )
        size = self._model.bytes(missing)
        traffic = self.record.ledger[partition]
        traffic.down += size
        traffic.moved_down += size
        content = RecordDict(dict(asked.content))
        content["arrays"] = self._model.payload(missing)
        return Message(
            content, node, kind, group_id=asked.metadata.group_id, ttl=asked.metadata.ttl
        )
