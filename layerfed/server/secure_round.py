"""A round in which the server sees the sum of its clients' updates, and no single one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
from flwr.app import Message

from layerfed.config import SecAggConfig
from layerfed.exchange import RefusedReply, read_config
from layerfed.secure.messages import (
    attach,
    question,
    read_keys,
    read_masked,
    read_sealed,
    read_shares,
    secret_bytes,
)
from layerfed.secure.participant import SMALLEST
from layerfed.secure.secure_sum import SecureSum
from layerfed.server.population import RoundFailed
from layerfed.server.round import (
    Round,
    Send,
    answer_to,
    refuse_no_steps,
)

__all__ = ["SecureRound", "secured"]


def secured(settings: SecAggConfig) -> Callable[..., Round]:
    """Return what makes rounds with secure aggregation, as `SelectiveStrategy` takes it."""
    return partial(SecureRound, settings=settings)


class SecureRound(Round):
    """Adds three exchanges to a round: keys, shares, and, after the training, unmask.

    What a client trained can neither be checked nor weighed up by itself: the norm of an update
    and whether its numbers are finite are unknown, so E2 is not estimated.

    Parameters
    ----------
    *args, **kwargs
        Those of `Round`.
    settings : SecAggConfig
    """

    def __init__(self, *args: Any, settings: SecAggConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = settings
        self._sum = SecureSum("", 0)
        self._never_agreed = 0

    def agree(self, messages: Iterable[Message], send: Send) -> Iterable[Message]:
        """Have the clients agree on masks; return the instructions to those that did.

        Raises
        ------
        RoundFailed
            If the clients are to train different layers, or too few agree.
        """
        self._refuse_different_masks()
        message_to = {self._partitions[m.metadata.dst_node_id]: m for m in messages}
        run = read_config(next(iter(message_to.values())))["run"]
        purpose = f"{run}/{self.record.round}"
        self._sum = SecureSum(purpose, self._settings.needed(len(message_to)))
        smallest = max(SMALLEST, self._sum.threshold)
        self._refuse_too_few("are there", len(message_to), smallest)
        self._ask(send, "query.keys", {client: {} for client in message_to}, self._take_keys)
        self._refuse_too_few("stated keys", len(self._sum.keys), smallest)
        roster = {
            "threshold": self._sum.threshold,
            "clients": self._sum.clients,
            "sealing": [keys.sealing for keys in self._sum.keys.values()],
            "masking": [keys.masking for keys in self._sum.keys.values()],
        }
        asked = dict.fromkeys(self._sum.clients, roster)
        self._ask(send, "query.shares", asked, self._take_sealed)
        self._refuse_too_few("shared secrets", len(self._sum.peers), self._sum.threshold)
        self._never_agreed = len(message_to) - len(self._sum.peers)
        try:
            point = self._sum.begin(self._settings.range, self._examples)
        except ValueError as error:
            raise RoundFailed(f"round {self.record.round}: {error}") from None
        for client in self._sum.peers:
            attach(
                message_to[client],
                purpose=purpose,
                peers=self._sum.peers,
                sealed=self._sum.sealed_for(client),
                limit=point.limit,
                scale=point.scale,
            )
            self._count(client, down=secret_bytes(message_to[client]))
        return [message_to[client] for client in self._sum.peers]

    def unmask(self, send: Send) -> None:
        """Have survivors reveal what takes the masks off the sum, and make it the mean.

        Raises
        ------
        RoundFailed
            If too few survived the training or answer now, or the sum cannot be one of theirs.
        """
        survivors, needed = self._sum.survivors, self._sum.threshold
        # Those that never agreed on masks have failed already; they are not late.
        self.record.late = max(0, self.record.late - self._never_agreed)
        self._refuse_too_few("sent an update", len(survivors), needed)
        asked = {client: {"survivors": survivors} for client in survivors}
        self._ask(send, "query.unmask", asked, self._take_shares, enough=needed)
        self._refuse_too_few("revealed shares", self._sum.revealed, needed)
        try:
            mean, examples = self._sum.open()
            stated = sum(self._examples[client] for client in survivors)
            if examples > stated:
                raise ValueError(f"it states {examples} examples, on joining they were {stated}")
        except ValueError as error:
            raise RoundFailed(
                f"round {self.record.round}: the secure sum is of no use, one of clients "
                f"{', '.join(map(str, survivors))} broke the protocol: {error}"
            ) from None
        layers = self.record.updated[survivors[0]]
        tensors = self._tensors(layers)
        update, start = {}, 0
        for name in sorted(tensors):
            end = start + tensors[name].size
            update[name] = mean[start:end].reshape(tensors[name].shape)
            start = end
        self._mean.add(layers, update, examples)

    def _fold_in(
        self, partition: int, due: Mapping[str, Mapping[str, np.ndarray]], answer: Message
    ) -> tuple[int, Mapping[str, float], Mapping[str, float]]:
        """Add a masked update to the sum; nothing is known of its norms."""
        if partition not in self._sum.peers:
            raise RefusedReply("it has not agreed on masks")
        vector, metrics = read_masked(answer, self._tensors(due).values())
        refuse_no_steps(metrics)
        self._sum.add(partition, vector)
        return self._examples[partition], metrics, {}

    def _tensors(self, layers: Iterable[str]) -> dict[str, np.ndarray]:
        return {t: v for layer in layers for t, v in self._model.layer(layer).items()}

    def _ask(
        self,
        send: Send,
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
                self._nodes[client],
                self.record.round,
                self._timeout,
                purpose=self._sum.purpose,
                **content,
            )
            self._count(client, down=secret_bytes(message))
            messages.append(message)
        asked = {message.metadata.dst_node_id: message for message in messages}
        taken = 0
        for node, reply in send(messages):
            with self._refusing(node, kind.removeprefix("query.")) as client:
                answer = answer_to(asked[node], reply)
                self._count(client, up=secret_bytes(answer))
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

    def _count(self, client: int, down: int = 0, up: int = 0) -> None:
        traffic = self.record.ledger[client]
        traffic.down += down
        traffic.moved_down += down
        traffic.up += up
        traffic.moved_up += up

    def _refuse_too_few(self, did: str, clients: int, needed: int) -> None:
        if clients < needed:
            reasons = [f"client {f.partition}: {f.reason}" for f in self.record.failures[:5]]
            raise RoundFailed(
                f"round {self.record.round}: {clients} clients {did}, {needed} are needed for a secure "
                f"sum (secagg.threshold = {self._settings.threshold:g}, and {SMALLEST} to begin with). "
                f"{'; '.join(reasons)}"
            )

    def _refuse_different_masks(self) -> None:
        selection = self.record.selection
        assert selection is not None
        groups: dict[tuple[str, ...], list[int]] = {}
        for client, mask in zip(selection.clients, selection.choice.masks, strict=True):
            names = [name for name, on in zip(selection.layers, mask, strict=True) if on]
            groups.setdefault(tuple(names), []).append(client)
        if len(groups) > 1:
            who = "; ".join(
                f"clients {', '.join(map(str, clients))}: {', '.join(names) or 'no block'}"
                for names, clients in groups.items()
            )
            raise RoundFailed(
                f"round {self.record.round}: secure aggregation adds up the same layers of all clients, "
                f"but they are to train different ones ({who}); raise strategy.consistency, give all "
                "clients the same budget, or set secagg.enabled=false"
            )
