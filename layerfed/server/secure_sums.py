"""Secure sums as a step of a round: the server sees the sum of the updates, and no single update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Message

from layerfed.config import SecAggConfig
from layerfed.config.secagg import SMALLEST
from layerfed.exchange import RefusedReply
from layerfed.runs.records import RoundFailed, RoundRecord
from layerfed.secure.messages import (
    attach,
    question,
    read_keys,
    read_padded,
    read_sealed,
    read_shares,
    secret_bytes,
)
from layerfed.secure.secure_sum import SecureSum
from layerfed.server.round import Round, answer_to
from layerfed.server.steps import Arrival, ServerStep

__all__ = ["SecureSums"]


class SecureSums(ServerStep):
    """Adds three exchanges to a round: keys and shares before training, and unmask after it.

    The server cannot check a single update. It knows neither its norm nor whether its numbers are
    finite, so E2 is not estimated.

    Parameters
    ----------
    settings : SecAggConfig
    """

    reads = True

    def __init__(self, settings: SecAggConfig) -> None:
        self._settings = settings
        self._sum = SecureSum("", 0)
        self._never_agreed = 0

    def before_training(self, round: Round, messages: list[Message]) -> list[Message]:
        """Have the clients agree on pads; return the instructions for the clients that did.

        Raises
        ------
        RoundFailed
            If the clients' masks differ, or too few clients agree.
        """
        _refuse_different_masks(round.record)
        message_to = {round.client_of(message): message for message in messages}
        purpose = f"{round.run}/{round.record.round}"
        self._sum = SecureSum(purpose, self._settings.needed(len(message_to)))
        self._refuse_too_few(round, "are there", len(message_to), self._sum.threshold)
        self._ask(round, "query.keys", {client: {} for client in message_to}, self._take_keys)
        self._refuse_too_few(round, "stated keys", len(self._sum.keys), self._sum.threshold)
        roster = {
            "threshold": self._sum.threshold,
            "clients": self._sum.clients,
            "sealing": [keys.sealing for keys in self._sum.keys.values()],
            "masking": [keys.masking for keys in self._sum.keys.values()],
        }
        asked = dict.fromkeys(self._sum.clients, roster)
        self._ask(round, "query.shares", asked, self._take_sealed)
        self._refuse_too_few(round, "shared secrets", len(self._sum.peers), self._sum.threshold)
        self._never_agreed = len(message_to) - len(self._sum.peers)
        try:
            point = self._sum.begin(self._settings.range, round.examples)
        except ValueError as error:
            raise RoundFailed(f"round {round.record.round}: {error}") from None
        for client in self._sum.peers:
            attach(
                message_to[client],
                purpose=purpose,
                peers=self._sum.peers,
                sealed=self._sum.sealed_for(client),
                limit=point.limit,
                scale=point.scale,
            )
            round.record.ledger[client].went_down(secret_bytes(message_to[client]))
        return [message_to[client] for client in self._sum.peers]

    def receive(self, arrival: Arrival, record: RoundRecord) -> None:
        """Add a padded update to the sum; the server learns nothing else of it."""
        if arrival.client not in self._sum.peers:
            raise RefusedReply("it has not agreed on pads")
        tensors = [t for layer in arrival.asked.values() for t in layer.values()]
        vector, arrival.metrics = read_padded(arrival.message, tensors)
        self._sum.add(arrival.client, vector)
        arrival.due, arrival.examples = arrival.asked, arrival.stated

    def after_training(self, round: Round) -> None:
        """Have the survivors reveal shares, remove the pads from the sum, and add its mean to the round.

        Raises
        ------
        RoundFailed
            If too few clients sent an update or reveal shares, or the sum cannot be one of theirs.
        """
        record = round.record
        survivors, needed = self._sum.survivors, self._sum.threshold
        # Clients that never agreed on pads count as failed already; they are not late.
        record.late = max(0, record.late - self._never_agreed)
        self._refuse_too_few(round, "sent an update", len(survivors), needed)
        asked = {client: {"survivors": survivors} for client in survivors}
        self._ask(round, "query.unmask", asked, self._take_shares, enough=needed)
        self._refuse_too_few(round, "revealed shares", self._sum.revealed, needed)
        try:
            mean, examples = self._sum.open()
            stated = sum(round.examples[client] for client in survivors)
            if examples != stated:
                raise ValueError(f"it states {examples} examples, and its clients {stated}")
        except ValueError as error:
            raise RoundFailed(
                f"round {record.round}: the secure sum cannot be used, since one of clients "
                f"{', '.join(map(str, survivors))} broke the protocol: {error}"
            ) from None
        layers = record.updated[survivors[0]]
        tensors = {t: v for layer in layers for t, v in round.model.layer(layer).items()}
        update, start = {}, 0
        for name in sorted(tensors):
            end = start + tensors[name].size
            update[name] = mean[start:end].reshape(tensors[name].shape)
            start = end
        round.add_sum(layers, update, examples)

    def _ask(
        self,
        round: Round,
        kind: str,
        contents: Mapping[int, Mapping[str, Any]],
        take: Callable[[int, Message], None],
        enough: int | None = None,
    ) -> None:
        """Send a message of the protocol to some clients and take their answers."""
        messages = []
        for client, content in contents.items():
            message = question(
                kind,
                round.nodes[client],
                round.record.round,
                round.timeout,
                purpose=self._sum.purpose,
                **content,
            )
            round.record.ledger[client].went_down(secret_bytes(message))
            messages.append(message)
        asked = {message.metadata.dst_node_id: message for message in messages}
        taken = 0
        for reply in round.send(messages):
            with round.refusing(reply, kind.removeprefix("query.")) as client:
                answer = answer_to(asked[reply.metadata.src_node_id], reply)
                round.record.ledger[client].went_up(secret_bytes(answer))
                take(client, answer)
                taken += 1
            if taken == enough:
                break

    def _take_keys(self, client: int, answer: Message) -> None:
        self._sum.keys[client] = read_keys(answer)

    def _take_sealed(self, client: int, answer: Message) -> None:
        self._sum.take_sealed(client, read_sealed(answer, len(self._sum.clients)))

    def _take_shares(self, client: int, answer: Message) -> None:
        self._sum.take_shares(client, read_shares(answer, len(self._sum.peers)))

    def _refuse_too_few(self, round: Round, did: str, clients: int, needed: int) -> None:
        if clients < needed:
            raise RoundFailed(
                f"round {round.record.round}: {clients} clients {did}, {needed} are needed for a "
                f"secure sum (secagg.threshold = {self._settings.threshold:g}, at least {SMALLEST}). "
                f"{round.reasons()}"
            )


def _refuse_different_masks(record: RoundRecord) -> None:
    selection = record.selection
    if selection is None:
        raise RoundFailed(f"round {record.round}: no layers are selected")
    groups: dict[tuple[str, ...], list[int]] = {}
    for client, mask in zip(selection.clients, selection.choice.sends, strict=True):
        names = [name for name, on in zip(selection.layers, mask, strict=True) if on]
        groups.setdefault(tuple(names), []).append(client)
    if len(groups) > 1:
        who = "; ".join(
            f"clients {', '.join(map(str, clients))}: {', '.join(names) or 'no block'}"
            for names, clients in groups.items()
        )
        raise RoundFailed(
            f"round {record.round}: secure aggregation adds up the same layers of all clients, "
            f"but they are to train different ones ({who}); raise strategy.consistency, give all "
            "clients the same budget, or set secagg.enabled=false"
        )
