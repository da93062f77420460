"""A block for each client, such that the cohort covers all blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from layerfed.config.seeding import Stream, generator
from layerfed.runs.records import Choice
from layerfed.server.candidates import Candidates
from layerfed.strategies.base import SelectiveStrategy
from layerfed.strategies.ranking import affordable


class FedBCGD(SelectiveStrategy):
    """Every client trains all layers, and sends the block that it is given, and the head.

    FedBCGD (Liu et al., ACM MM 2024, arXiv 2603.05116) cuts the model into N blocks and one that all
    clients share, here the head. Block b moves by the mean update of its clients K_b:

        θ_b ← θ_b + Σ_{i∈K_b} w_i Δ_{i,b},   θ_shared ← θ_shared + Σ_i w_i Δ_{i,shared}

    Clients train the whole network all the same, since blocks that are frozen in turn drift apart. So
    the uplink shrinks to 1/N, and compute does not. The authors' code draws an order of the blocks in
    each round and gives them out in turn; so does this, and a cohort smaller than L continues the order
    in the next round. A client is given the first block that waits and that it trains; blocks that its
    node's own limit or `train.skip` leaves out wait for the next client. Momentum on the
    server, as in FedBCGD+, is `server.optimizer = "momentum"`; its control variates are not here.
    """

    name = "fedbcgd"
    within_budget = False
    masks = "own"

    def selects_in(self, server_round: int) -> bool:
        """Return True: blocks are given out in each round."""
        return True

    def select(self, candidates: Candidates) -> Choice:
        """Give each client the next block of the order that it trains."""
        choice = affordable(candidates)
        waiting = [int(block) for block in self.kept.get("waiting", ())]
        cycle = int(self.kept.get("cycle", 0))
        sent = np.zeros_like(choice.masks)
        for row, mask in enumerate(choice.masks & candidates.runs):
            if not waiting:
                waiting, cycle = self._order(candidates, cycle), cycle + 1
            # One that trains none of the waiting blocks is given another, and they wait on.
            tried = [*waiting, *self._order(candidates, cycle)]
            block = next((block for block in tried if mask[block]), None)
            if block is None:
                continue
            sent[row, block] = True
            if block in waiting:
                waiting.remove(block)
        self.kept["waiting"], self.kept["cycle"] = (
            np.array(waiting, dtype=np.int64),
            np.array(cycle),
        )
        return replace(choice, sent=sent)

    def _order(self, candidates: Candidates, cycle: int) -> list[int]:
        rng = generator(candidates.seed, Stream.MASK, cycle)
        order: list[int] = rng.permutation(self.layers.num_blocks).tolist()
        return order
