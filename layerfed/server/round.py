"""One round in progress: what came back from whoever was asked, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging import INFO, WARNING

import numpy as np
from flwr.app import ArrayRecord, Message
from flwr.common.logger import log

from layerfed.exchange import (
    CODECS,
    Codec,
    RefusedReply,
    check_reply,
    layer_steps,
    read_evaluation,
    read_held,
    read_missing,
    read_statistics,
    read_train_reply,
    read_upload,
    read_uploaded,
)
from layerfed.exchange.arrays import carried_bytes, moved_bytes
from layerfed.exchange.clipping import clipped
from layerfed.runs.records import Failure
from layerfed.server.aggregation import WEIGHTED_MEAN, Aggregation, Aggregator
from layerfed.server.asking import Asking
from layerfed.server.global_model import GlobalModel
from layerfed.server.holdings import Holdings
from layerfed.server.optimizers import ServerOptimizer
from layerfed.server.population import RoundFailed
from layerfed.server.theory import UpdateSpread, importance_term

__all__ = ["Round", "Send", "answer_to", "refuse_no_steps"]

Send = Callable[[Iterable[Message]], Iterator[tuple[int, Message | None]]]
"""Sends messages and yields each node's reply as it arrives; None for a node that gives none."""

# What a client is asked in each phase.
ASKED = {"probe": "query.probe", "train": "train", "evaluate": "evaluate"}


class Round(Asking):
    """Builds a round's messages, folds its replies in, and keeps the record.

    Every reply is checked here. One that cannot be used is logged, counted and left out; the round goes
    on with the others.

    Parameters
    ----------
    number : int
        t, from 1.
    model : GlobalModel
        θ^t; moved to θ^{t+1} by `finish`.
    nodes, timeout, holdings
        As in `Asking`.
    examples : Mapping[int, int], optional
        d_i as each client stated it when it joined, by partition id; an update may not claim more.
    codec : Codec
        What updates are written in.
    aggregation : Aggregation
        How updates become one, and how far one client's say goes.
    """

    def __init__(
        self,
        number: int,
        model: GlobalModel,
        nodes: Mapping[int, int],
        timeout: float,
        holdings: Holdings,
        examples: Mapping[int, int] | None = None,
        codec: Codec = CODECS["float32"],
        aggregation: Aggregation = WEIGHTED_MEAN,
    ) -> None:
        super().__init__(number, model, nodes, timeout, holdings)
        self._examples = examples or {}
        self._codec = codec
        self._aggregation = aggregation
        self._mean = aggregation.begin(model.layers)
        self._spread = UpdateSpread()
        self._losses: dict[int, tuple[int, float]] = {}
        self._answered: set[tuple[int, str]] = set()

    def agree(self, messages: Iterable[Message], send: Send) -> Iterable[Message]:
        """Do what must be done before anybody trains; return the instructions that are to be sent.

        Nothing here: see `SecureRound`.
        """
        return messages

    def unmask(self, send: Send) -> None:
        """Do what remains to be done for the mean once all updates are in: nothing, or as above."""

    def take_statistics(
        self, replies: Iterable[tuple[int, Message | None]], names: Sequence[str], enough: int
    ) -> dict[int, dict[str, np.ndarray]]:
        """Read up to `enough` probe replies: {partition: {statistic: (L,)}}."""
        found: dict[int, dict[str, np.ndarray]] = {}
        for node, reply in replies:
            with self._refusing(node, "probe") as partition:
                answer = self._answer(node, reply, "probe")
                rows, costs = read_statistics(answer, names, self._model.layers.num_blocks)
                found[partition] = rows
                record = self.record
                record.flops_probe += costs.get("flops", 0.0)
                record.peak_memory_probe = max(
                    record.peak_memory_probe, costs.get("peak-memory", 0.0)
                )
                size = sum(row.nbytes for row in rows.values())
                record.ledger[partition].up += size
                record.ledger[partition].moved_up += size
            if len(found) == enough:
                break
        return found

    def take_update(self, node: int, reply: Message | None) -> None:
        """Check one training reply and fold it into the mean; it can be dropped then."""
        with self._refusing(node, "train") as partition:
            answer = self._answer(node, reply, "train")
            arrays = answer.content.array_records.get("arrays", ArrayRecord()).values()
            traffic = self.record.ledger[partition]
            traffic.up += carried_bytes(arrays)
            traffic.moved_up += moved_bytes(arrays)
            due = self._due_from(node, partition, answer)
            examples, metrics, norms_sq = self._fold_in(partition, due, answer)
            if norms_sq:
                moved = self._steps(node, metrics.get("steps"))
                self._spread.add(partition, examples, moved, norms_sq)
            record = self.record
            record.updated[partition] = tuple(due)
            record.replies += 1
            traffic.full_up += self._model.bytes(self._model.layers.names)
            record.flops += metrics.get("flops", 0.0)
            record.steps += metrics.get("steps", 0.0)
            record.train_seconds += metrics.get("seconds", 0.0)
            record.peak_memory = max(record.peak_memory, metrics.get("peak-memory", 0.0))
            if "loss" in metrics:  # private clients do not say
                self._losses[partition] = (examples, metrics["loss"])

    def _fold_in(
        self, partition: int, due: Mapping[str, Mapping[str, np.ndarray]], answer: Message
    ) -> tuple[int, Mapping[str, float], Mapping[str, float]]:
        """Check what a client trained and add it to the mean.

        Returns the number of examples it counts as, the metrics, and ‖Δ_{i,l}‖² of each layer; none
        where they cannot be known.
        """
        expected = {t: v for tensors in due.values() for t, v in tensors.items()}
        train = read_train_reply(answer, expected, self._codec)
        most = self._examples.get(partition, train.examples)
        if train.examples > most:
            raise RefusedReply(f"it claims {train.examples} examples, and had {most} on joining")
        refuse_no_steps(train.metrics)
        examples = self._aggregation.counted(train.examples)
        norms_sq = self._mean.add(due, self._clipped(train.update), examples)
        return examples, train.metrics, norms_sq

    def _clipped(self, update: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Scale an update down to the largest norm that is allowed, if there is one."""
        bound = self._aggregation.clip
        if not bound:
            return update
        update, norm = clipped(update, bound)
        self.record.clipped += norm > bound
        return update

    def finish(
        self,
        min_replies: int,
        optimizer: ServerOptimizer,
        applied: Callable[[Aggregator], Collection[str]] = lambda mean: mean.weights,
    ) -> tuple[str, ...]:
        """Move every layer somebody trained to θ^{t+1}; the others stay bit-identical.

        Parameters
        ----------
        min_replies : int
        optimizer : ServerOptimizer
        applied : Callable[[Aggregator], Collection[str]]
            Chooses which of those layers move; by default all.

        Returns
        -------
        tuple[str, ...]
            Names of the layers that moved.

        Raises
        ------
        RoundFailed
            If fewer than `min_replies` updates were usable, or a layer would not be finite. The model
            is unchanged then.
        """
        if self.record.replies < min_replies:
            raise self.failed("train", min_replies)
        if self.record.clipped:
            log(
                INFO,
                "round %d: %d of %d updates were scaled down to a norm of %g (server.clip)",
                self.record.round,
                self.record.clipped,
                self.record.replies,
                self._aggregation.clip,
            )
        self._mean.close()
        chosen = applied(self._mean)
        names = tuple(layer for layer in self._mean.weights if layer in chosen)
        self._estimate_theory(names)
        moved = {}
        for layer in names:
            before = self._model.layer(layer)
            after = optimizer.step(self._model.layers[layer], before, self._mean.pop(layer))
            if not all(np.isfinite(tensor).all() for tensor in after.values()):
                raise RoundFailed(
                    f"round {self.record.round}: layer '{layer}' would hold NaN or Inf; lower "
                    "train.lr or server.lr"
                )
            moved[layer] = after
        # Frees what was kept of layers that do not move.
        self._mean = self._aggregation.begin(self._model.layers)
        for layer, tensors in moved.items():
            self._model.replace(layer, tensors)
        self.record.moved = names
        self.record.updated = {
            client: tuple(layer for layer in layers if layer in moved)
            for client, layers in self.record.updated.items()
        }
        # In the order of partition ids, so that the figure does not depend on who answered first.
        losses = [self._losses[partition] for partition in sorted(self._losses)]
        if losses:
            self.record.train_loss = sum(n * x for n, x in losses) / sum(n for n, _ in losses)
        return names

    def _estimate_theory(self, names: Sequence[str]) -> None:
        """Estimate E1 and E2 from what this round has seen, given the layers that move."""
        record, blocks = self.record, self._model.layers.blocks
        record.update_norm = self._spread.median_norm()
        selection = record.selection
        if selection is not None and "grad_norm_sq" in selection.statistics:
            record.e1 = importance_term(
                selection.statistics["grad_norm_sq"],
                np.array([self._counted(client) for client in selection.clients]),
                np.array([block.name in names for block in blocks]),
            )
        if record.lr:
            there = [block.name for block in blocks if block.name in names]
            norms_sq = {layer: self._mean.norm_sq(layer) for layer in there}
            known = {layer: norm for layer, norm in norms_sq.items() if norm is not None}
            if len(known) == len(there):
                everyone = sum(map(self._counted, self._partitions.values()))
                record.e2 = self._spread.heterogeneity_term(known, record.lr, everyone)
                record.e2_masks = self._spread.heterogeneity_term(known, record.lr)

    def _steps(self, node: int, stated: float | None) -> dict[str, float] | None:
        """Return in how many steps each block moved on a client; None where it does not say."""
        if stated is None:
            return None
        return layer_steps(self._asked[node], self._model.layers, stated)

    def _counted(self, client: int) -> int:
        """Return as how many examples those count that a client stated when it joined."""
        return self._aggregation.counted(self._examples.get(client, 1))

    def take_evaluations(
        self, replies: Iterable[tuple[int, Message | None]]
    ) -> dict[str, float] | None:
        """Average the clients' metrics, weighted by their held-out examples; None if there is none."""
        found: dict[int, tuple[int, dict[str, float]]] = {}
        for node, reply in replies:
            with self._refusing(node, "evaluate") as partition:
                found[partition] = read_evaluation(self._answer(node, reply, "evaluate"))
        rows = [found[partition] for partition in sorted(found)]
        weights = [self._aggregation.counted(examples) for examples, _ in rows]
        if not rows:
            return None
        return {
            key: sum(n * metrics[key] for n, (_, metrics) in zip(weights, rows, strict=True))
            / sum(weights)
            for key in ("loss", "accuracy")
        }

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
            yield partition
        except RefusedReply as error:
            self.record.failures.append(Failure(partition, phase, str(error)))
            log(
                WARNING, "round %d: %s of client %d: %s", self.record.round, phase, partition, error
            )

    def _answer(self, node: int, reply: Message | None, phase: str) -> Message:
        """Return a node's answer in a phase, if it is one: its first, and to what it was asked."""
        if node not in self._partitions:
            raise RefusedReply(f"node {node} was not asked")
        asked = self._asked.get(node)
        if asked is None or asked.metadata.message_type != ASKED[phase]:
            raise RefusedReply(f"it was not asked to {phase}")
        reply = answer_to(asked, reply)
        if (node, phase) in self._answered:
            raise RefusedReply("it has answered already")
        self._answered.add((node, phase))
        read_held(reply)
        if read_missing(reply, self._model.layers):
            raise RefusedReply("it lacks layers that were sent to it")
        return reply

    def _due_from(
        self, node: int, partition: int, answer: Message
    ) -> dict[str, dict[str, np.ndarray]]:
        """Return the global tensors, by layer, of which a client's reply holds the updates.

        Those of its mask's blocks, and the head; where it may choose what to send, those it sent.
        """
        selection = self.record.selection
        if selection is None or partition not in selection.clients:
            raise RefusedReply("it was not asked to train")
        row = list(selection.clients).index(partition)
        names = self._model.layers.trained(selection.choice.masks[row])
        asked = {name: self._model.layer(name) for name in names}
        upload = read_upload(self._asked[node])
        if upload is None:
            return asked
        sent = read_uploaded(answer, asked, upload[0], self._codec)
        return {name: asked[name] for name in sent}


def answer_to(asked: Message, reply: Message | None) -> Message:
    """Return the reply to an instruction, if it is an answer."""
    if reply is None:
        raise RefusedReply("no reply in time")
    if reply.has_error():
        raise RefusedReply(str(reply.error.reason))
    check_reply(reply, asked)
    return reply


def refuse_no_steps(metrics: Mapping[str, float]) -> None:
    """Refuse a reply that says that it trained for less than a step."""
    steps = metrics.get("steps")
    if steps is not None and steps < 1:
        raise RefusedReply(f"it claims {steps:g} local steps")
