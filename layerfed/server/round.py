"""One round in progress: its messages, its replies, and the new global model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging import INFO, WARNING
from typing import Any, Protocol

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.common.logger import log

from layerfed.exchange import (
    Probe,
    RefusedReply,
    TrainInstruction,
    check_reply,
    instruction,
    read_evaluation,
    read_held,
    read_missing,
    read_statistics,
    statistics_of,
)
from layerfed.exchange.arrays import carried_bytes, moved_bytes
from layerfed.exchange.metrics import Numbers, client_metrics
from layerfed.exchange.scores import ACCURACY, LOSS, Score
from layerfed.flower_compat import ErrorCode
from layerfed.runs.records import Failure, RoundFailed, RoundRecord
from layerfed.server.aggregation import WEIGHTED_MEAN, Aggregation, Aggregator
from layerfed.server.global_model import GlobalModel
from layerfed.server.holdings import Holdings
from layerfed.server.optimizers import ServerOptimizer
from layerfed.server.steps import Arrival, Decoding, ServerStep
from layerfed.server.theory import UpdateSpread, importance_term

__all__ = ["Round", "Send", "answer_to"]

# The message type of each phase.
ASKED = {"probe": "query.probe", "train": "train", "evaluate": "evaluate"}


class Send(Protocol):
    """A function that sends messages and yields a reply for each; see `transport.exchange`."""

    def __call__(
        self,
        messages: Iterable[Message],
        *,
        again: Callable[[Message], Message | None] | None = None,
    ) -> Iterator[Message]:
        """Send messages. If `again` returns a message for a reply, send it and await its reply too."""


class Round:
    """Builds a round's messages, adds its replies to the model, and keeps the record.

    Every reply is checked here. A reply that cannot be used is logged, counted and left out; the round
    goes on with the others.

    Parameters
    ----------
    number : int
        t, from 1; 0 is the initial model.
    model : GlobalModel
        θ^t; `finish` moves it to θ^{t+1}.
    nodes : Mapping[int, int]
        Node id of each client, by partition id.
    holdings : Holdings
        The layers that each node is known to hold; kept up to date.
    send : Send
    timeout : float
        Seconds after which a message need not be answered.
    examples : Mapping[int, int], optional
        d_i as each client stated it when it joined, by partition id; an update may not claim more.
    steps : Sequence[ServerStep]
        The steps of each update, in order.
    aggregation : Aggregation
        The rule that combines updates.
    refused : Callable[[int], None]
        Told the node id of each client whose answer was refused or was an error of its own.
    scores : Sequence[Score]
        The task's scores, which clients state of their own examples.
    metric : Score
        The main one.
    token : str
        The run's token, under which clients keep their personal layers.
    personal : Callable[[int], int]
        Returns the last round in which a client (partition id) trained its personal layers, or 0.
    """

    def __init__(
        self,
        number: int,
        model: GlobalModel,
        nodes: Mapping[int, int],
        holdings: Holdings,
        send: Send,
        timeout: float,
        *,
        examples: Mapping[int, int] | None = None,
        steps: Sequence[ServerStep] = (Decoding(),),
        aggregation: Aggregation = WEIGHTED_MEAN,
        refused: Callable[[int], None] = lambda node: None,
        scores: Sequence[Score] = (ACCURACY, LOSS),
        metric: Score = ACCURACY,
        token: str = "",
        personal: Callable[[int], int] = lambda client: 0,
    ) -> None:
        self._token, self._personal = token, personal
        self._client_metrics = client_metrics(scores)
        self.record = RoundRecord(number, metric=metric, numbers=Numbers(self._client_metrics))
        self.model = model
        self.nodes = nodes
        self.send = send
        self.timeout = timeout
        self.examples = examples or {}
        self._partitions = {node: partition for partition, node in nodes.items()}
        self._holdings = holdings
        self._steps = steps
        self._aggregation = aggregation
        self._refused = refused
        self._mean = aggregation.begin(model.layers, model.sent.tensors, number)
        self._spread = UpdateSpread()
        self.disagreement: float | None = None
        """The disagreement of this round's updates (`UpdateSpread`); None if it is unknown."""
        self.after_training: dict[int, tuple[Probe, Mapping[str, np.ndarray]]] = {}
        """What clients (partition ids) were asked for after their training, and measured."""
        self._instructions: dict[int, TrainInstruction] = {}
        self._asked: dict[int, Message] = {}
        self._resent: set[tuple[int, str]] = set()
        self._answered: set[tuple[int, str]] = set()

    def client_of(self, message: Message) -> int:
        """Return the client (partition id) that a message goes to."""
        return self._partitions[message.metadata.dst_node_id]

    def mask_of(self, client: int) -> tuple[bool, ...]:
        """Return the blocks that a client was asked to train."""
        return self._instructions[client].mask

    @property
    def run(self) -> str:
        """The run's token, which is in every instruction."""
        return next((own.run for own in self._instructions.values()), "")

    # ---------------------------------------------------------------------------------- messages
    def ask_to_train(self, instructions: Mapping[int, TrainInstruction]) -> list[Message]:
        """Build a train message for each client (partition id), and let the steps prepare the round."""
        self._instructions = dict(instructions)
        configs = [own.to_config() for own in instructions.values()]
        messages = self.messages("train", list(instructions), configs)
        for step in self._steps:
            messages = step.before_training(self, messages)
        return messages

    def messages(
        self, kind: str, clients: Sequence[int], configs: Sequence[Mapping[str, Any]]
    ) -> list[Message]:
        """Build one message for each client, with the layers that its node is not known to hold."""
        model = self.model.sent
        manifest, changed = model.manifest(), model.changed
        # Clients that lack the same layers share one record, and all share the serialised tensors.
        payloads: dict[tuple[str, ...], ArrayRecord] = {}
        built = []
        for client, config in zip(clients, configs, strict=True):
            node = self.nodes[client]
            lacking = self._holdings.lacks(node, manifest, changed)
            sent = () if self._holdings.shares(node) else lacking
            if sent not in payloads:
                payloads[sent] = model.payload(sent)
            self.record.ledger[client].went_down(model.bytes(lacking), moved=model.bytes(sent))
            message = instruction(
                kind,
                node,
                server_round=self.record.round,
                timeout=self.timeout,
                manifest=manifest,
                arrays=payloads[sent],
                config={**config, **self._taken_for(client)},
            )
            self._asked[node] = message
            built.append(message)
        return built

    def _taken_for(self, client: int) -> dict[str, int | str]:
        """Return what a node must still be, since it may have been restarted since it was asked."""
        known: dict[str, int | str] = {"client": client}
        if client in self.examples:
            known["examples"] = self.examples[client]
        if self.model.layers.kept:
            known |= {"run": self._token, "personal": self._personal(client)}
        return known

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Send messages and yield replies as they arrive; resend layers that a node lacks."""
        return self.send(messages, again=self._again)

    def _again(self, reply: Message) -> Message | None:
        """Return the instruction with the missing layers that a reply names, once a node and phase.

        Returns None for any other reply. The versions that the node says it holds are noted. A reply
        that cannot be read is refused later, by the method that takes it.
        """
        node = reply.metadata.src_node_id
        partition, asked = self._partitions.get(node), self._asked.get(node)
        if reply.has_error() or partition is None or asked is None:
            return None
        try:
            check_reply(reply, asked)
            missing = read_missing(reply, self.model.layers)
            held, store = read_held(reply)
            # Digests of unknown content are not kept.
            known = set(self.model.sent.manifest().digests.values())
            self._holdings.learn(node, known.intersection(held), store)
        except RefusedReply:
            return None
        kind = asked.metadata.message_type
        if not missing or (node, kind) in self._resent:
            return None
        self._resent.add((node, kind))
        number, names = self.record.round, ", ".join(missing)
        log(INFO, "round %d: client %d lacks %s; sent again", number, partition, names)
        self.record.ledger[partition].went_down(self.model.sent.bytes(missing))
        content = RecordDict(dict(asked.content))
        content["arrays"] = self.model.sent.payload(missing)
        return Message(
            content, node, kind, group_id=asked.metadata.group_id, ttl=asked.metadata.ttl
        )

    # ----------------------------------------------------------------------------------- replies
    def take_statistics(
        self, replies: Iterable[Message], asked: Mapping[int, Probe], enough: int
    ) -> dict[int, dict[str, np.ndarray]]:
        """Read probe replies until `enough` are usable.

        Parameters
        ----------
        replies : Iterable[Message]
        asked : Mapping[int, Probe]
            By partition.
        enough : int

        Returns
        -------
        dict[int, dict[str, numpy.ndarray]]
            {partition: {statistic: (K,)}}, for the K blocks that the client was asked for.
        """
        found: dict[int, dict[str, np.ndarray]] = {}
        for reply in replies:
            with self.refusing(reply, "probe") as partition:
                answer, own = self._answer(reply, "probe"), asked[partition]
                rows, stated = read_statistics(answer, own.statistics, sum(own.blocks))
                found[partition] = rows
                self.record.numbers.add(partition, "probe", stated, 1)
                self.record.ledger[partition].went_up(_bytes(rows))
            if len(found) == enough:
                break
        return found

    def take_updates(self, replies: Iterable[Message], enough: int) -> None:
        """Check training replies and add each to the mean as it arrives, until `enough` are added."""
        asked, answered = len(self._instructions), 0
        for reply in replies:
            answered += 1  # noqa: SIM113
            self._take_update(reply)
            del reply  # freed before the next is made; `enumerate` would hold it
            if self.record.replies == enough:
                self.record.late += max(0, asked - answered)
                break
        if isinstance(replies, Generator):
            replies.close()  # takes back what is still to be answered, before other exchanges begin
        for step in self._steps:
            step.after_training(self)

    def _take_update(self, reply: Message) -> None:
        record = self.record
        with self.refusing(reply, "train") as partition:
            answer = self._answer(reply, "train")
            arrays = answer.content.array_records.get("arrays", ArrayRecord()).values()
            record.ledger[partition].went_up(carried_bytes(arrays), moved=moved_bytes(arrays))
            own = self._instructions[partition]
            if own.probe is not None:
                rows = statistics_of(answer, own.probe.statistics, sum(own.probe.blocks))
                record.ledger[partition].went_up(_bytes(rows))
            layers = own.asked(self.model.layers)
            asked = {name: own.part(self.model.due(name)) for name in layers}
            stated = self.examples.get(partition, 2**62)
            codec = own.codec_for(self.model.layers)
            arrival = Arrival(partition, answer, own, asked, stated, codec)
            for step in self._steps:
                step.receive(arrival, record)
            if own.probe is not None:
                self.after_training[partition] = own.probe, rows
                record.numbers.add(partition, "probe", arrival.metrics, 1)
            arrival.examples = self.weight(arrival.examples)
            if asked and not arrival.due:  # it was out of time before a layer was finished
                record.late += 1
                record.numbers.add(partition, "train", arrival.metrics, arrival.examples)
                self.add_sum((), {}, arrival.examples)  # one of the cohort all the same
                return
            if arrival.update:
                arrival.update = own.whole(arrival.update, self.model.tensors)
                self.add(arrival)
            elif not arrival.due:  # none of it is shared; it is one of the cohort all the same
                self.add_sum((), {}, arrival.examples)
            record.updated[partition] = tuple(arrival.due)
            record.replies += 1
            whole = sum(layer.sent_bytes for layer in self.model.layers.layers)
            record.ledger[partition].full_up += whole
            record.numbers.add(partition, "train", arrival.metrics, arrival.examples)

    def add(self, arrival: Arrival) -> None:
        """Add one update to the mean."""
        norms_sq = self._mean.add(arrival.due, arrival.update, arrival.examples)
        if not arrival.measured:
            return
        steps = arrival.metrics.get("steps")
        moved = None
        if steps is not None:
            moved = arrival.instruction.layer_steps(self.model.layers, steps)
        self._spread.add(arrival.client, arrival.examples, moved, norms_sq)

    def add_sum(
        self, layers: Iterable[str], update: Mapping[str, np.ndarray], examples: int
    ) -> None:
        """Add the mean update of several clients whose single updates are unknown."""
        self._mean.add(layers, update, examples)

    def take_evaluations(self, replies: Iterable[Message]) -> None:
        """Read clients' metrics on their held-out examples."""
        for reply in replies:
            with self.refusing(reply, "evaluate") as partition:
                answer = self._answer(reply, "evaluate")
                examples, stated = read_evaluation(answer, self._client_metrics)
                # Or one client could state so many that its scores are those of all.
                examples = min(examples, self.examples.get(partition, examples))
                self.record.numbers.add(partition, "evaluate", stated, self.weight(examples))

    def weight(self, examples: int) -> int:
        """Return the number of examples that a client with `examples` counts as."""
        for step in self._steps:
            examples = step.weigh(examples)
        return examples

    # --------------------------------------------------------------------------------- the model
    def finish(
        self,
        min_replies: int,
        optimizer: ServerOptimizer,
        applied: Callable[[Aggregator], Collection[str]] = lambda mean: mean.weights,
    ) -> tuple[str, ...]:
        """Move every layer that a client trained to θ^{t+1}; the other layers stay bit-identical.

        Parameters
        ----------
        min_replies : int
        optimizer : ServerOptimizer
        applied : Callable[[Aggregator], Collection[str]]
            Chooses the trained layers that move; by default all.

        Returns
        -------
        tuple[str, ...]
            Names of the layers that moved.

        Raises
        ------
        RoundFailed
            If fewer than `min_replies` updates were usable, or a new layer would not be finite. The
            model is then unchanged.
        """
        record = self.record
        if record.replies < min_replies:
            raise self.failed("train", min_replies)
        for step in self._steps:
            step.close(self._mean.sums, record)
        chosen = applied(self._mean)
        names = tuple(layer for layer in self._mean.weights if layer in chosen)
        self._estimate_theory(names)
        moved = {}
        for layer in names:
            share = self._aggregation.share(self._mean, layer)
            means, after = self._mean.pop(layer), dict[str, np.ndarray]()
            for name, before in self.model.layer(layer).items():
                # One tensor at a time, so that each mean is freed when it has been used.
                mean = {name: means.pop(name) * share if share < 1 else means.pop(name)}
                after |= optimizer.step(self.model.layers[layer], {name: before}, mean)
            if not all(np.isfinite(tensor).all() for tensor in after.values()):
                raise RoundFailed(
                    f"round {record.round}: layer '{layer}' would hold NaN or Inf; lower train.lr or "
                    "server.lr"
                )
            moved[layer] = after
        # This frees the sums of layers that do not move.
        self._mean = self._aggregation.begin(self.model.layers)
        for layer, tensors in moved.items():
            try:
                self.model.replace(layer, tensors)
            except ValueError as error:  # more than float16 holds
                raise RoundFailed(f"round {record.round}: layer '{layer}': {error}") from None
        record.moved = names
        record.updated = {
            client: tuple(layer for layer in layers if layer in moved)
            for client, layers in record.updated.items()
        }
        return names

    def _estimate_theory(self, names: Sequence[str]) -> None:
        """Estimate E1 and E2 from this round's statistics and updates, given the layers that move."""
        record, blocks = self.record, self.model.layers.blocks
        record.update_norm = self._spread.median_norm()
        norms_sq = {layer: self._mean.norm_sq(layer) for layer in names}
        known = {layer: norm for layer, norm in norms_sq.items() if norm is not None}
        self.disagreement = self._spread.disagreement(known)
        selection = record.selection
        # Gradients of an earlier model, or of networks without some blocks, are not those of this model.
        at_model = selection is not None and selection.measured is None and selection.runs is None
        if selection is not None and at_model and "grad_norm_sq" in selection.statistics:
            record.e1 = importance_term(
                selection.statistics["grad_norm_sq"],
                np.array([self.weight(self.examples.get(c, 1)) for c in selection.clients]),
                np.array([b.name in {*names, *self.model.layers.personal} for b in blocks]),
            )
        if record.lr and len(known) == len(names):
            there = {block.name: known[block.name] for block in blocks if block.name in known}
            everyone = sum(self.weight(self.examples.get(c, 1)) for c in self.nodes)
            record.e2 = self._spread.heterogeneity_term(there, record.lr, everyone)
            record.e2_masks = self._spread.heterogeneity_term(there, record.lr)

    def complete(self) -> RoundRecord:
        """Return the record, with the entries that steps add to it."""
        for step in self._steps:
            step.record(self.record)
        return self.record

    # ------------------------------------------------------------------------------------ errors
    def failed(self, phase: str, needed: int) -> RoundFailed:
        """Return an error with the number of usable replies and the reasons for the others."""
        late = f"; {self.record.late} clients were late" if self.record.late else ""
        return RoundFailed(
            f"round {self.record.round}: {self.record.replies} usable replies in {phase}, "
            f"{needed} are needed (federation.min-replies){late}. {self.reasons()}"
        )

    def reasons(self) -> str:
        """Return the reasons for which the first few clients gave no usable reply."""
        return "; ".join(f"client {f.partition}: {f.reason}" for f in self.record.failures[:5])

    @contextmanager
    def refusing(self, reply: Message, phase: str) -> Iterator[int]:
        """Yield the client's partition id; log and count a `RefusedReply` that is raised inside."""
        node = reply.metadata.src_node_id
        partition = self._partitions.get(node, -1)
        try:
            yield partition
        except RefusedReply as error:
            self.record.failures.append(Failure(partition, phase, str(error)))
            number = self.record.round
            log(WARNING, "round %d: %s of client %d: %s", number, phase, partition, error)
            # Not where it was silent: asking a node that is gone would hold up the next round.
            if node in self._partitions and (not reply.has_error() or _raised(reply)):
                self._refused(node)

    def _answer(self, reply: Message, phase: str) -> Message:
        """Return a node's answer in a phase; refuse a second answer, or one to another message."""
        node = reply.metadata.src_node_id
        if node not in self._partitions:
            raise RefusedReply(f"node {node} was not asked")
        asked = self._asked.get(node)
        if asked is None or asked.metadata.message_type != ASKED[phase]:
            raise RefusedReply(f"it was not asked to {phase}")
        answer_to(asked, reply)
        if (node, phase) in self._answered:
            raise RefusedReply("it has answered already")
        self._answered.add((node, phase))
        read_held(reply)
        if read_missing(reply, self.model.layers):
            raise RefusedReply("it lacks layers that were sent to it")
        return reply


def _bytes(rows: Mapping[str, np.ndarray]) -> int:
    return sum(row.nbytes for row in rows.values())


def _raised(reply: Message) -> bool:
    return bool(reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION)


def answer_to(asked: Message, reply: Message) -> Message:
    """Return a reply that answers a message.

    Raises
    ------
    RefusedReply
        If it is an error, or the reply to another message.
    """
    if reply.has_error():
        raise RefusedReply(str(reply.error.reason))
    check_reply(reply, asked)
    return reply
