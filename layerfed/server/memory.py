"""The memory between selections: clients' masks, and their last statistics.

Selecting in every k-th round only saves the probes in between [S, "selection period"]. A client that
took part in the last selection keeps its masks. A client that did not gets masks when it is first
sampled, within its own budget. (The released code stops with an error there, and exceeds budgets [C].)

What a client measured earlier may also enter a selection as it is: if it measures a part of its blocks
in each probe (`strategy.probe-share`), or measures after its training (`strategy.probe = "after"`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from layerfed.exchange import Probe
from layerfed.runs.records import Choice
from layerfed.server.candidates import Candidates

__all__ = ["HELD", "Memory"]

HELD = "held"
"""The solver's name in a round in which every client keeps its masks."""
MEASURED = "measured"


class Memory:
    """Every client's last masks, those of the last selection apart, and its last statistics."""

    def __init__(self) -> None:
        self._masks: dict[int, np.ndarray] = {}
        self._before: dict[int, np.ndarray] = {}
        self._profiles: dict[str, dict[int, np.ndarray]] = {}
        self._mean_profile: dict[str, np.ndarray] = {}
        self._scale: dict[str, float] = {}
        self.kept: dict[str, np.ndarray] = {}
        """What the strategy itself keeps, by name."""

    def learn(self, candidates: Candidates, choice: Choice) -> None:
        """Remember a selection; its masks replace those of the previous one."""
        self._before |= self._masks
        self._masks = {}
        self._add(candidates, choice)
        for name, table in candidates.statistics.items():
            totals = table.sum(axis=1)
            some = totals > 0  # a gradient that is zero everywhere has no profile
            profiles = table / np.where(some, totals, 1.0)[:, None]
            known, runs = self._profiles.setdefault(name, {}), candidates.runs
            # Of a block that a client skips now, nothing is measured.
            mean = profiles.sum(axis=0) / np.maximum((runs & some[:, None]).sum(axis=0), 1)
            if not runs.all():
                mean = mean / max(float(mean.sum()), np.finfo(float).tiny)
            for client, own, ran in zip(candidates.clients, profiles, runs, strict=True):
                before = known.get(client, mean)
                known[client] = np.where(ran, own * (1.0 - before[~ran].sum()), before)
            self._mean_profile[name] = mean
            self._scale[name] = float(np.median(totals[some])) if some.any() else 0.0

    def last(self, clients: Sequence[int]) -> np.ndarray | None:
        """Return the layers of each client's last selection, shape (n, L); None before the first.

        A client that has none gets the share of the last selection's clients that have each layer.
        """
        if not self._masks:
            return None
        shares = np.mean([masks.any(axis=0) for masks in self._masks.values()], axis=0)
        known = {c: masks.any(axis=0) for c, masks in (self._before | self._masks).items()}
        return np.array([known.get(client, shares) for client in clients], dtype=np.float64)

    def estimate(self, clients: Sequence[int]) -> dict[str, np.ndarray]:
        """Estimate clients' present statistics without a probe: {statistic: (n, L)}.

        A client's profile is the share of each layer in its statistics. The estimate is the client's own
        last profile, or else the mean profile of the last selection's clients, times the total of that
        selection's median client. Profiles and the median are used so that a client with large gradients
        does not decide for all. The scale is common because gradients shrink during training: a client
        that was last probed long ago would otherwise outweigh the others.
        """
        return {
            name: self._scale[name]
            * np.stack([known.get(client, self._mean_profile[name]) for client in clients])
            for name, known in self._profiles.items()
        }

    def complete(
        self, candidates: Candidates, select: Callable[[Candidates], Choice], *, bounded: bool
    ) -> tuple[Candidates, Choice]:
        """Return the masks of a round between two selections.

        Parameters
        ----------
        candidates : Candidates
            The round's clients, without statistics.
        select : Callable[[Candidates], Choice]
            The strategy's `select`. It is called only if a client has no masks yet, or if its budget no
            longer affords them, since a node may return with another budget.
        bounded : bool
            Whether masks must keep to the budgets.

        Returns
        -------
        tuple[Candidates, Choice]
            The candidates with their estimated statistics, and the masks of all clients.
        """
        held = {}
        for row, client in enumerate(candidates.clients):
            masks = self._masks.get(client)
            if masks is None:
                continue
            if not bounded or candidates.problem([row] * len(masks)).feasible(masks):
                held[row] = masks
        candidates = replace(candidates, held=held, statistics=self.estimate(candidates.clients))
        if len(held) < len(candidates.clients):
            choice = select(candidates)
        else:
            choice = Choice(np.zeros(candidates.costs.shape, dtype=bool), solver=HELD)
        schedules = [
            held[row] if row in held else choice.schedule(row)
            for row in range(len(candidates.clients))
        ]
        choice = replace(
            choice,
            masks=np.stack([masks.any(axis=0) for masks in schedules]),
            schedules=schedules if any(len(masks) > 1 for masks in schedules) else None,
        )
        self._add(candidates, choice)
        return candidates, choice

    def _add(self, candidates: Candidates, choice: Choice) -> None:
        if choice.sent is not None or choice.ranks is not None:
            return  # a mask does not say what its client sends; such a strategy selects in every round
        for row, client in enumerate(candidates.clients):
            self._masks[client] = choice.schedule(row)

    # ------------------------------------------------------------- statistics as clients gave them
    def note(
        self, client: int, server_round: int, probe: Probe, rows: Mapping[str, np.ndarray]
    ) -> None:
        """Note what a client measured in a round; its statistics of other blocks stay as they are.

        Parameters
        ----------
        client : int
        server_round : int
        probe : Probe
            What it was asked for.
        rows : Mapping[str, numpy.ndarray]
            {statistic: (K,)}, for the K blocks of the probe.
        """
        blocks = np.array(probe.blocks)
        for name, values in {**rows, MEASURED: np.asarray(server_round)}.items():
            before = self.kept.get(key := f"given/{client}/{name}")
            row = np.zeros(len(blocks)) if before is None else before.copy()
            row[blocks] = values
            self.kept[key] = row

    def given(self, client: int, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Return the statistics of these names that a client gave last, shape (L,) each."""
        rows = {name: self.kept.get(f"given/{client}/{name}") for name in names}
        return {name: row for name, row in rows.items() if row is not None}

    def measured(self, client: int) -> np.ndarray | None:
        """Return the round in which a client measured each block last, shape (L,); None if never."""
        return self.kept.get(f"given/{client}/{MEASURED}")

    def part(self, client: int, share: float, num_blocks: int) -> np.ndarray:
        """Return the blocks that a client measures next, booleans of shape (L,): all at first.

        The blocks are cut into stretches of the share's size, from the output down. The stretch whose
        numbers are the oldest is next, and of equally old ones the one nearest the output. So all are
        measured in turn, also by a client that is sampled now and then.
        """
        last, size = self.measured(client), max(1, round(share * num_blocks))
        if last is None:
            return np.ones(num_blocks, dtype=bool)
        stretches = [slice(max(0, end - size), end) for end in range(num_blocks, 0, -size)]
        part = np.zeros(num_blocks, dtype=bool)
        part[min(stretches, key=lambda stretch: float(last[stretch].min()))] = True
        return part

    # --------------------------------------------------------------------------- for checkpoints
    def state(self) -> dict[str, np.ndarray]:
        """Return the whole memory as arrays, by name."""
        found = {f"masks/{client}": masks for client, masks in self._masks.items()}
        found |= {f"before/{client}": masks for client, masks in self._before.items()}
        found |= {f"kept/{name}": array for name, array in self.kept.items()}
        for name, known in self._profiles.items():
            found |= {f"profile/{name}/{client}": row for client, row in known.items()}
            found[f"mean/{name}"] = self._mean_profile[name]
            found[f"scale/{name}"] = np.asarray(self._scale[name])
        return found

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore a memory from the arrays that `state` returned."""
        for key, value in state.items():
            kind, *rest = key.split("/")
            if kind == "masks":
                self._masks[int(rest[0])] = value
            elif kind == "before":
                self._before[int(rest[0])] = value
            elif kind == "profile":
                self._profiles.setdefault(rest[0], {})[int(rest[1])] = value
            elif kind == "kept":
                self.kept["/".join(rest)] = value
            elif kind == "mean":
                self._mean_profile[rest[0]] = value
            else:
                self._scale[rest[0]] = float(value)
