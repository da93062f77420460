"""What stays on a client: layers (`model.personal`) and second adapters (`model.personal-rank`).

A client trains them, and sends none. It has its own version of them in its layer store, in a file that
only its user may read. Clients of a simulation, which share the server's memory, have theirs in the
user's default store: so a run that is killed can be continued. The file has the versions of several
rounds, as many as the run's oldest checkpoint may go back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message

from layerfed.client.workbench import Node
from layerfed.exchange import LayerStore, open_store, read_config
from layerfed.exchange.store import MemoryStore

__all__ = ["OwnLayers", "own_layers"]

Tensors = Mapping[str, np.ndarray]


@dataclass
class OwnLayers:
    """The personal layers and adapters of one client in one round.

    Attributes
    ----------
    node : Node
    key : str
        Their name in the store.
    number : int
        t, from 1.
    versions : dict[int, Tensors]
        The tensors that have changed since the base, after each of some rounds, the last one first.
    """

    node: Node
    key: str
    number: int
    versions: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)

    @property
    def store(self) -> LayerStore:
        """The node's store on the disk."""
        found = self.node.store
        if isinstance(found, MemoryStore):
            return open_store(self.node.run.exchange.store, self.node.run.exchange.store_size)
        return found

    def recall(self, before: int, due: int) -> Tensors:
        """Return the tensors as they were when a round began, and forget those of later rounds.

        Parameters
        ----------
        before : int
            The round.
        due : int
            The last round in which this client trained them, as the server knows; 0 if it never did.

        Raises
        ------
        ValueError
            If the store has lost them.
        """
        for name, values in (self.store.recall(self.key) or {}).items():
            number, _, tensor = name.partition("/")
            if int(number) < before:
                version = self.versions.setdefault(int(number), {})
                if tensor:
                    version[tensor] = values
        self.versions = dict(sorted(self.versions.items(), reverse=True))
        last = next(iter(self.versions), 0)
        if last < due:
            raise ValueError(
                f"this client trained its personal layers in round {due}, and its store lacks them: was "
                "it cleared, is it too small (exchange.store-size), or is this another machine? The "
                "client cannot go on in this run"
            )
        return self.versions.get(last, {})

    def keep(self, update: Tensors) -> Tensors:
        """Keep what is personal as training left it, and return the update of the rest.

        Parameters
        ----------
        update : Mapping[str, numpy.ndarray]
            Δ_i of all layers that the client trained.
        """
        resident, layers = self.node.bench.resident, self.node.bench.resident.layers
        shared: dict[str, np.ndarray] = {}
        own: dict[str, np.ndarray] = {}
        for name, change in update.items():
            if name in layers.kept:
                own[name] = resident.values(name) + change
            else:
                shared[name] = change
        if layers.kept:
            own = {**next(iter(self.versions.values()), {}), **own}
            run = self.node.run.run
            oldest = self.number - run.checkpoint_every * run.checkpoints
            # Of those before the oldest checkpoint, the last one may still be needed.
            needed = [n for n in self.versions if n > oldest]
            needed += [n for n in self.versions if n <= oldest][:1]
            kept = {self.number: own, **{n: self.versions[n] for n in needed}}
            content = {f"{n}/{t}": x for n, tensors in kept.items() for t, x in tensors.items()}
            # A version is there also if no time was left to train any of these layers.
            content |= {f"{n}/": np.zeros(0, np.float32) for n in kept}
            self.store.remember(self.key, content)
        return shared


@contextmanager
def own_layers(node: Node, message: Message) -> Iterator[OwnLayers]:
    """Let the resident model have a client's personal layers, and the global ones afterwards.

    Parameters
    ----------
    node : Node
    message : flwr.app.Message
        What the client is asked. An evaluation is of the layers after the training of its round.
    """
    asked, resident = read_config(message), node.bench.resident
    mine = OwnLayers(node, f"{asked.get('run', '')}/{node.partition}/personal", asked["round"])
    if not resident.layers.kept:
        yield mine
        return
    after = message.metadata.message_type == "evaluate"
    with resident.wearing(mine.recall(mine.number + after, asked.get("personal", 0))):
        yield mine
