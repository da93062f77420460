"""Who takes part: the nodes that are connected, and the partition of the data each one holds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from logging import INFO, WARNING

import numpy as np
from flwr.common.logger import log
from flwr.serverapp import Grid

from layerfed.config import ConfigError
from layerfed.exchange import Description, RefusedReply, exchange, instruction, read_description
from layerfed.seeding import Stream, generator

__all__ = ["Population", "RoundFailed"]

POLL_SECONDS = 1.0


class RoundFailed(RuntimeError):
    """Too few clients to go on; the message says how many there were and why the others failed."""


class Population:
    """The clients that can be sampled, by partition id.

    Flower's node ids are random in every run, so a run repeats only if sampling, budgets and local
    randomness go by partition id. Each node is asked once which partition it holds.

    Parameters
    ----------
    expected : int | None
        Size of the population; None takes whoever is connected.
    at_least : int
        Clients to wait for before the first round.
    num_blocks : int | None
        L, which the costs that clients state must fit.
    """

    def __init__(self, expected: int | None, at_least: int, num_blocks: int | None = None) -> None:
        self.expected = expected
        self.at_least = at_least
        self.num_blocks = num_blocks
        self._described: dict[int, Description] = {}
        self._refused: set[int] = set()
        self.nodes: dict[int, int] = {}
        """Connected clients: node id by partition id."""

    def wait(self, grid: Grid, timeout: float) -> None:
        """Wait until enough clients are connected.

        Raises
        ------
        RoundFailed
            If they are not within `timeout` seconds.
        """
        deadline, said = time.monotonic() + timeout, -1
        while len(self.refresh(grid, timeout)) < self.at_least:
            if time.monotonic() > deadline:
                raise RoundFailed(
                    f"{len(self.nodes)} clients after {timeout:g} s, "
                    f"federation.clients-per-round = {self.at_least} are needed"
                )
            if len(self.nodes) != said:
                said = len(self.nodes)
                log(INFO, "waiting for clients: %d of %d", said, self.at_least)
            time.sleep(POLL_SECONDS)

    def refresh(self, grid: Grid, timeout: float) -> Mapping[int, int]:
        """Ask nodes that are new who they are, and return the connected ones by partition id."""
        connected = sorted(grid.get_node_ids())
        unknown = [n for n in connected if n not in self._described and n not in self._refused]
        questions = [
            instruction("query.describe", node, server_round=0, timeout=timeout) for node in unknown
        ]
        for node, reply in exchange(grid, questions, timeout):
            if reply is None:
                continue  # asked again in the next round
            try:
                if reply.has_error():
                    raise RefusedReply(reply.error.reason)
                self._described[node] = read_description(reply, self.num_blocks)
            except RefusedReply as error:
                self._refused.add(node)
                log(WARNING, "node %d is left out, its description was refused: %s", node, error)
        if unknown and len(self._refused) == len(connected):
            raise RoundFailed("no node could describe itself; the warnings above say why")
        self.nodes = {}
        for node in connected:
            if node in self._described:
                self._place(node, self._described[node])
        return self.nodes

    def _place(self, node: int, description: Description) -> None:
        stated = description.partitions
        if self.expected is not None and stated is not None and stated != self.expected:
            raise ConfigError(
                f"federation.clients = {self.expected}, but the federation has {stated} SuperNodes; "
                f'start it with --federation-config "num-supernodes={self.expected}", or set '
                f"federation.clients={stated}"
            )
        if self.expected is not None and description.partition >= self.expected:
            raise ConfigError(
                f"a node holds partition {description.partition}, but federation.clients = "
                f"{self.expected} allows 0 to {self.expected - 1}"
            )
        other = self.nodes.setdefault(description.partition, node)
        if other != node:
            log(
                WARNING,
                "nodes %d and %d both hold partition %d; only the first is asked",
                other,
                node,
                description.partition,
            )

    def description(self, partition: int) -> Description:
        """Return what a connected client said of itself."""
        return self._described[self.nodes[partition]]

    def sample(self, count: int, server_round: int, seed: int) -> list[int]:
        """Draw up to `count` partition ids without replacement, in ascending order."""
        present = sorted(self.nodes)
        rng = generator(seed, Stream.SAMPLING, server_round)
        chosen = rng.choice(np.array(present), size=min(count, len(present)), replace=False)
        return sorted(int(p) for p in chosen)
