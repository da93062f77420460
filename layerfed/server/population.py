"""The connected nodes, the partition of the data that each one holds, and the sampling of a cohort."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from logging import DEBUG, INFO, WARNING

import numpy as np
from flwr.common.logger import log
from flwr.serverapp import Grid

from layerfed.config import ConfigError
from layerfed.config.seeding import Stream, generator
from layerfed.exchange import (
    WRONG_SETTINGS,
    Description,
    Manifest,
    RefusedReply,
    check_reply,
    instruction,
    read_description,
    read_held,
)
from layerfed.exchange.arrays import printable
from layerfed.runs.records import RoundFailed
from layerfed.server.holdings import Holdings
from layerfed.server.transport import exchange

__all__ = ["Population", "federation_size"]

POLL_SECONDS = 1.0
# The seconds that a node has to describe itself, and how often it is asked. A silent node must not hold
# up a federation for the whole timeout of a training round.
PATIENCE_SECONDS = 120.0
ATTEMPTS = 3


class Population:
    """The clients that can be sampled, by partition id.

    Flower's node ids are random in every run, so a run repeats only if sampling, budgets and local
    randomness go by partition id. Each node is asked once which partition it holds, and again when its
    answer may have changed: after it was away, and after its reply was refused in a round.

    Parameters
    ----------
    expected : int | None
        Size of the population; None takes the connected clients.
    at_least : int
        Clients to wait for before the first round.
    num_blocks : int | None
        L, the length of the costs that clients state.
    holdings : Holdings, optional
        Gets the layers that a node still holds when it joins.
    check : Callable[[Description], None], optional
        Raises `ConfigError` for a client that the run cannot use.
    """

    def __init__(
        self,
        expected: int | None,
        at_least: int,
        num_blocks: int | None = None,
        holdings: Holdings | None = None,
        check: Callable[[Description], None] = lambda description: None,
    ) -> None:
        self.expected = expected
        self.at_least = at_least
        self.num_blocks = num_blocks
        self.holdings = holdings or Holdings()
        self.check = check
        self._described: dict[int, Description] = {}
        self._stale: set[int] = set()
        self._refused: dict[int, str] = {}
        self._nonsense: set[int] = set()
        self._errors: dict[int, list[str]] = {}
        self._misfits: list[str] = []
        self._warned: set[str] = set()
        self.nodes: dict[int, int] = {}
        """Connected clients: node id by partition id."""

    def wait(self, grid: Grid, timeout: float) -> None:
        """Wait until enough clients are connected.

        Raises
        ------
        ConfigError
            If nodes are connected and none fits the configured federation. If some fit, the others are
            left out and the run begins.
        RoundFailed
            If too few are connected within `timeout` seconds, or none can describe itself.
        """
        deadline, said = time.monotonic() + timeout, -1
        while len(self.refresh(grid, timeout)) < self.at_least:
            if self._misfits and not self.nodes:
                raise ConfigError(self._misfits[0])
            connected = set(grid.get_node_ids())
            hopeless = {n for n in connected if n in self._refused or self._gave_up(n)}
            if connected and hopeless == connected:
                reasons = [*self._refused.values(), *(e[-1] for e in self._errors.values())]
                distinct = "; ".join(list(dict.fromkeys(reasons))[:3])
                raise RoundFailed(f"no node could describe itself: {distinct}")
            if time.monotonic() > deadline:
                raise RoundFailed(
                    f"{len(self.nodes)} clients after {timeout:g} s, {self.at_least} are needed "
                    "(federation.clients-per-round)"
                    + "".join(f"; left out: {reason}" for reason in self._misfits[:3])
                )
            if len(self.nodes) != said:
                said = len(self.nodes)
                log(INFO, "waiting for clients: %d of %d", said, self.at_least)
            time.sleep(POLL_SECONDS)

    def refresh(
        self, grid: Grid, timeout: float, manifest: Manifest | None = None
    ) -> Mapping[int, int]:
        """Ask new nodes to describe themselves, and return the connected nodes by partition id.

        With a manifest, nodes also say which of its layers they still hold, for example from before a
        restart. A node whose answer is refused is left out for as long as it is connected. A node that
        answers with an error, or not in time, is asked again in the next refreshes, `ATTEMPTS` times in
        all. A node whose settings do not fit is asked again in every round, since they may be mended.
        """
        connected = sorted(grid.get_node_ids())
        self._forget_absent(connected)
        if manifest is not None:
            self._refused = {n: r for n, r in self._refused.items() if n in self._nonsense}
        unknown = [
            node
            for node in connected
            if (node not in self._described or node in self._stale)
            and node not in self._refused
            and not self._gave_up(node)
        ]
        patience = min(timeout, PATIENCE_SECONDS)
        questions = {
            node: instruction(
                "query.describe", node, server_round=0, timeout=patience, manifest=manifest
            )
            for node in unknown
        }
        for reply in exchange(grid, questions.values(), patience):
            node = reply.metadata.src_node_id
            if reply.has_error():
                reason = printable(str(reply.error.reason))
                if reply.error.code == WRONG_SETTINGS:
                    self._refused[node] = reason
                    self._warn("node %d is left out: %s", node, reason)
                    continue
                self._errors.setdefault(node, []).append(reason)
                log(WARNING, "node %d did not describe itself: %s", node, reason)
                continue
            try:
                check_reply(reply, questions[node])
                held, store = read_held(reply)
                self._learn(node, read_description(reply, self.num_blocks))
                known = set(manifest.digests.values()) if manifest is not None else set()
                self.holdings.learn(node, known.intersection(held), store)
            except RefusedReply as error:
                self._refused[node] = str(error)
                self._nonsense.add(node)
                log(WARNING, "node %d is left out, its description was refused: %s", node, error)
        # A node that held a partition keeps it, also if a later node has a smaller id.
        holders = set(self.nodes.values())
        self.nodes = {}
        for node in sorted(connected, key=lambda n: (n not in holders, n)):
            if node in self._described and node not in self._stale | self._refused.keys():
                self._place(node, self._described[node])
        return self.nodes

    def ask_again(self, node: int) -> None:
        """Ask a node with the next refresh who it is: what it stated before may no longer hold."""
        self._stale.add(node)

    def _forget_absent(self, connected: Collection[int]) -> None:
        """Forget the nodes that are not connected: they may come back with other settings or data."""
        for partition, node in self.nodes.items():
            if node not in connected:
                log(INFO, "client %d is away (node %d)", partition, node)
        for node in {*self._described, *self._refused, *self._errors}.difference(connected):
            self.ask_again(node)
            self._refused.pop(node, None)
            self._errors.pop(node, None)
            self._nonsense.discard(node)

    def _learn(self, node: int, description: Description) -> None:
        former = self._described.get(node, description)
        self._described[node] = description
        self._stale.discard(node)
        for one in fields(Description):
            before, now = getattr(former, one.name), getattr(description, one.name)
            if before != now:
                log(INFO, "node %d states another %s: %s, before %s", node, one.name, now, before)

    def _warn(self, text: str, node: int, reason: str) -> None:
        """Warn that a node is left out; the same reason is a warning once, and then a debug line."""
        log(DEBUG if reason in self._warned else WARNING, text, node, reason)
        self._warned.add(reason)

    def _gave_up(self, node: int) -> bool:
        return len(self._errors.get(node, ())) >= ATTEMPTS

    def _place(self, node: int, description: Description) -> None:
        if misfit := self._misfit(description):
            self._warn("node %d is left out: %s", node, misfit)
            self._misfits.append(misfit)
            self._refused[node] = misfit
            self.ask_again(node)
            return
        other = self.nodes.setdefault(description.partition, node)
        if other != node:
            log(
                WARNING,
                "nodes %d and %d both hold partition %d; only the first is asked",
                other,
                node,
                description.partition,
            )

    def _misfit(self, description: Description) -> str | None:
        """Return the reason for which a node does not fit the configured federation, or None."""
        try:
            self.check(description)
        except ConfigError as error:
            return str(error)
        if self.expected is None:
            return None
        if description.partitions not in (None, self.expected):
            return (
                f"federation.clients = {self.expected}, but the federation has "
                f"{description.partitions} SuperNodes; start it with --federation-config "
                f'"num-supernodes={self.expected}", or set federation.clients=0 to take it as it is'
            )
        if description.partition >= self.expected:
            return (
                f"a node holds partition {description.partition}, but federation.clients = "
                f"{self.expected} allows 0 to {self.expected - 1}"
            )
        return None

    def description(self, partition: int) -> Description:
        """Return a connected client's description of itself."""
        return self._described[self.nodes[partition]]

    def sample(self, count: int, server_round: int, seed: int) -> list[int]:
        """Draw up to `count` partition ids without replacement, in ascending order."""
        present = sorted(self.nodes)
        rng = generator(seed, Stream.SAMPLING, server_round)
        chosen = rng.choice(np.array(present), size=min(count, len(present)), replace=False)
        return sorted(int(p) for p in chosen)


def federation_size(grid: Grid, timeout: float) -> int:
    """Return the number of clients of a federation that is to be taken as it is.

    That is the number of partitions that more than half of the nodes that state one agree on, once as
    many nodes are connected. So no single node decides it.

    Raises
    ------
    ConfigError
        If no node states it.
    RoundFailed
        If the nodes do not agree, or too few are connected, within `timeout` seconds; or if none can
        describe itself.
    """
    population, deadline, said = Population(None, at_least=1), time.monotonic() + timeout, ""
    while True:
        population.wait(grid, max(0.0, deadline - time.monotonic()))
        stated = [population.description(partition).partitions for partition in population.nodes]
        sizes = Counter(size for size in stated if size is not None)
        if not sizes:
            raise ConfigError(
                "federation.clients = 0 takes the number of clients from the nodes' num-partitions, and "
                "no node states it; set federation.clients"
            )
        size, votes = sizes.most_common(1)[0]
        if 2 * votes > sum(sizes.values()) and len(stated) >= size:
            return size
        waits = (
            f"{len(stated)} nodes are connected, and {votes} of them state num-partitions = {size}"
        )
        if time.monotonic() > deadline:
            raise RoundFailed(
                f"federation.clients = 0: {waits}; start the others, or set federation.clients"
            )
        if waits != said:
            said = waits
            log(INFO, "waiting for the whole federation: %s", waits)
        time.sleep(POLL_SECONDS)
