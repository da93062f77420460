"""One round in progress: who was asked for what, and what came back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging import WARNING
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.common.logger import log

from layerfed.aggregation import MaskedMean
from layerfed.exchange import (
    GlobalModel,
    RefusedReply,
    instruction,
    read_evaluation,
    read_statistics,
    read_train_reply,
)
from layerfed.records import Failure, RoundRecord
from layerfed.strategies.population import RoundFailed

__all__ = ["Round"]


class Round:
    """Builds a round's messages, folds its replies in, and keeps the record.

    Every reply is checked here. One that cannot be used is logged, counted and left out; the round goes
    on with the others.

    Parameters
    ----------
    number : int
        t, from 1.
    model : GlobalModel
        θ^t; moved to θ^{t+1} by `finish`.
    nodes : Mapping[int, int]
        Node id of each client, by partition id.
    timeout : float
        Seconds that a message is worth answering.
    examples : Mapping[int, int], optional
        d_i as each client stated it when it joined, by partition id; an update may not claim more.
    """

    def __init__(
        self,
        number: int,
        model: GlobalModel,
        nodes: Mapping[int, int],
        timeout: float,
        examples: Mapping[int, int] | None = None,
    ) -> None:
        self.record = RoundRecord(number)
        self._model = model
        self._nodes = nodes
        self._partitions = {node: partition for partition, node in nodes.items()}
        self._timeout = timeout
        self._examples = examples or {}
        self._mean = MaskedMean(model.layers)
        self._losses: dict[int, tuple[int, float]] = {}

    def instructions(
        self, kind: str, clients: Sequence[int], configs: Sequence[Mapping[str, Any]]
    ) -> list[Message]:
        """Build one message a client; all share the same serialised layers."""
        manifest, payload = self._model.manifest(), self._model.payload()
        self.record.bytes_down += self._model.bytes(self._model.changed) * len(clients)
        return [
            instruction(
                kind,
                self._nodes[client],
                server_round=self.record.round,
                timeout=self._timeout,
                manifest=manifest,
                arrays=payload,
                **config,
            )
            for client, config in zip(clients, configs, strict=True)
        ]

    def take_statistics(
        self, replies: Iterable[tuple[int, Message | None]], names: Sequence[str]
    ) -> dict[int, dict[str, np.ndarray]]:
        """Read probe replies: {partition: {statistic: (L,)}} of the clients that gave them."""
        found: dict[int, dict[str, np.ndarray]] = {}
        for node, reply in replies:
            with self._refusing(node, "probe") as partition:
                rows, costs = read_statistics(_content(reply), names, self._model.layers.num_blocks)
                found[partition] = rows
                self.record.flops_probe += costs.get("flops", 0.0)
                self.record.bytes_up += sum(row.nbytes for row in rows.values())
        return found

    def take_update(self, node: int, reply: Message | None) -> None:
        """Check one training reply and fold it into the mean; it can be dropped then."""
        with self._refusing(node, "train") as partition:
            answer = _content(reply)
            trained = self._trained_by(partition)
            expected = {t: v for name in trained for t, v in self._model.layer(name).items()}
            train = read_train_reply(answer, expected)
            most = self._examples.get(partition, train.examples)
            if train.examples > most:
                raise RefusedReply(
                    f"it claims {train.examples} examples, and had {most} on joining"
                )
            self._mean.add(trained, train.update, train.examples)
            record, metrics = self.record, train.metrics
            record.replies += 1
            record.bytes_up += self._model.bytes(trained)
            record.bytes_full_up += self._model.bytes(self._model.layers.names)
            record.flops += metrics.get("flops", 0.0)
            record.peak_memory = max(record.peak_memory, metrics.get("peak-memory", 0.0))
            self._losses[partition] = (train.examples, metrics["loss"])

    def finish(self, min_replies: int) -> None:
        """Move every layer somebody trained to θ^{t+1}; the others stay bit-identical.

        Raises
        ------
        RoundFailed
            If fewer than `min_replies` updates were usable. The model is unchanged then.
        """
        if self.record.replies < min_replies:
            raise self.failed("train", min_replies)
        for layer in self._mean.weights:
            self._model.replace(layer, self._mean.apply(layer, self._model.layer(layer)))
        # In the order of partition ids, so that the figure does not depend on who answered first.
        losses = [self._losses[partition] for partition in sorted(self._losses)]
        self.record.train_loss = sum(n * x for n, x in losses) / sum(n for n, _ in losses)

    def take_evaluations(
        self, replies: Iterable[tuple[int, Message | None]]
    ) -> dict[str, float] | None:
        """Average the clients' metrics, weighted by their held-out examples; None if there is none."""
        found: dict[int, tuple[int, dict[str, float]]] = {}
        for node, reply in replies:
            with self._refusing(node, "evaluate") as partition:
                found[partition] = read_evaluation(_content(reply))
        rows = [found[partition] for partition in sorted(found)]
        total = sum(examples for examples, _ in rows)
        if not total:
            return None
        return {k: sum(n * m[k] for n, m in rows) / total for k in ("loss", "accuracy")}

    def failed(self, phase: str, needed: int) -> RoundFailed:
        """Return the error that says how many answered and why others did not."""
        reasons = "; ".join(f"client {f.partition}: {f.reason}" for f in self.record.failures[:5])
        return RoundFailed(
            f"round {self.record.round}: {self.record.replies} usable replies in {phase}, "
            f"{needed} are needed (federation.min-replies). {reasons}"
        )

    @contextmanager
    def _refusing(self, node: int, phase: str) -> Iterator[int]:
        """Give the client's partition id; log and count what is refused inside."""
        partition = self._partitions.get(node, -1)
        try:
            if partition < 0:
                raise RefusedReply(f"node {node} was not asked")
            yield partition
        except RefusedReply as error:
            self.record.failures.append(Failure(partition, phase, str(error)))
            log(
                WARNING, "round %d: %s of client %d: %s", self.record.round, phase, partition, error
            )

    def _trained_by(self, partition: int) -> list[str]:
        """Names of the layers a client was asked to train: its mask's blocks, and the head."""
        selection = self.record.selection
        if selection is None or partition not in selection.clients:
            raise RefusedReply("it was not asked to train")
        row = list(selection.clients).index(partition)
        return self._model.layers.trained(selection.choice.masks[row])


def _content(reply: Message | None) -> Message:
    if reply is None:
        raise RefusedReply("no reply in time")
    if reply.has_error():
        raise RefusedReply(reply.error.reason)
    return reply
