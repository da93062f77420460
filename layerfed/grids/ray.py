"""Clients in actors of Ray: several at once, on the cores and GPUs of a machine or of a cluster.

Only Ray's public interface is used. Each actor keeps data and model between messages, as a node does.
The server puts each version of a layer into Ray's object store once, and actors of the same machine read
it there without a copy.
"""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging import WARNING
from typing import Any

import numpy as np
import torch
from flwr.app import Error, Message, RecordDict
from flwr.common.logger import log

from layerfed.client.workbench import workbench
from layerfed.client_app import client_app
from layerfed.config import ConfigError, Flat, NodeConfig, Scalar
from layerfed.exchange import open_store
from layerfed.exchange.messages import has_manifest, read_manifest
from layerfed.exchange.store import MEMORY, MemoryStore
from layerfed.flower_compat import ErrorCode
from layerfed.grids.inprocess import InProcessGrid

__all__ = ["Actors", "Clients", "RayGrid"]

# Seconds that a pull waits for a reply if there is none: a reply is taken at once, and an exchange still
# sees its deadline.
WAIT_SECONDS = 0.05
# How often a message is asked before a client whose actors died counts as failed.
ATTEMPTS = 2

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Actors:
    """How many actors to start, with which share of a machine each, and where.

    Attributes
    ----------
    count : int
    cpus, gpus : float
        Cores and GPUs of each.
    address : str
        Address of a Ray cluster; empty starts Ray on this machine.
    device : str
        The run's device. `cuda:1` starts Ray on this GPU only.
    verbose : bool
        Whether to show Ray's own log.
    """

    count: int
    cpus: float = 1.0
    gpus: float = 0.0
    address: str = ""
    device: str = "auto"
    verbose: bool = False


class Lent(Mapping[str, Tensors]):
    """Layers in Ray's object store by digest; one is fetched when it is read."""

    def __init__(self, references: Mapping[str, Any]) -> None:
        self._references = references

    def __getitem__(self, name: str) -> Tensors:
        import ray

        found: Tensors = ray.get(self._references[name])
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._references)

    def __len__(self) -> int:
        return len(self._references)


class Clients:
    """The clients that work in one actor, one after another; parameters are those of `InProcessGrid`."""

    def __init__(
        self, num_supernodes: int, run_config: Flat, nodes: Sequence[Mapping[str, Scalar]]
    ) -> None:
        self._grid = InProcessGrid(client_app, num_supernodes, run_config, nodes)
        self._store = _memory()
        first = next(iter(self._grid._contexts.values()))
        workbench(run_config, NodeConfig.read(first.node_config))

    def ready(self) -> None:
        """Return when data and model are loaded."""

    def work(
        self,
        message: Message,
        state: RecordDict,
        own: Mapping[str, Tensors],
        store: str,
        layers: Mapping[str, Any],
    ) -> tuple[tuple[Message, RecordDict], Mapping[str, Tensors]]:
        """Let a client work on a message.

        Parameters
        ----------
        message : flwr.app.Message
        state : flwr.app.RecordDict
            What the client's context remembers.
        own : Mapping[str, dict[str, numpy.ndarray]]
            What the client remembers in its store.
        store : str
            Identity of the server's store.
        layers : Mapping[str, ray.ObjectRef]
            The layers in that store, by digest.

        Returns
        -------
        tuple[tuple[flwr.app.Message, flwr.app.RecordDict], Mapping[str, dict[str, numpy.ndarray]]]
            The reply with the client's new state, and what it now remembers in its store.
        """
        context = self._grid._contexts[message.metadata.dst_node_id]
        context.state = state
        self._store.borrow(store, Lent(layers), own)
        reply = self._grid._work(message)
        return (reply, context.state), self._store.own


def _memory() -> MemoryStore:
    store = open_store(MEMORY)
    assert isinstance(store, MemoryStore)
    return store


@dataclass
class _Asked:
    """A message in work: its id, its actor, what the actor returns, and how often it was asked."""

    identity: str
    message: Message
    actor: Any
    answer: Any
    own: Any
    attempt: int


def _reach(address: str) -> None:
    """Raise OSError at once if nothing answers at HOST:PORT; Ray itself tries for many minutes."""
    if place := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address):
        socket.create_connection((place[1].strip("[]"), int(place[2])), timeout=20).close()


class RayGrid(InProcessGrid):
    """A Grid whose nodes work in actors of Ray, as many at once as there are actors.

    Ray starts in the background, which takes seconds. Until the first actor is ready, clients work in
    this process, which has data and model already. Use the grid as a context: Ray ends with it.

    Parameters
    ----------
    actors : Actors
    num_supernodes, run_config, nodes
        As for `InProcessGrid`.
    """

    waits = True

    def __init__(
        self,
        actors: Actors,
        num_supernodes: int,
        run_config: Flat,
        nodes: Sequence[Mapping[str, Scalar]] = (),
    ) -> None:
        super().__init__(client_app, num_supernodes, run_config, nodes)
        self._actors = actors
        self._arguments = num_supernodes, dict(run_config), tuple(map(dict, nodes))
        self._store = _memory()
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []
        self._asked: dict[Any, _Asked] = {}
        self._attempts: dict[str, int] = {}
        self._replies: dict[str, Message] = {}
        self._unwanted: set[str] = set()
        self._layers: dict[str, Any] = {}
        self._own: dict[int, Any] = {}
        self._took_over = False
        self._failure: BaseException | None = None
        self._over = threading.Event()
        self._replaced_handler = False
        self._thread = threading.Thread(target=self._stay, daemon=True)

    def __enter__(self) -> RayGrid:
        """Start Ray, in the background if it is on this machine."""
        if self._actors.address:
            self._start()
            if self._failure is not None:
                self.__exit__()
                raise ConfigError(
                    f"run.ray-address = '{self._actors.address}': no Ray cluster can be used there "
                    f"({self._failure})"
                ) from None
        else:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End Ray, with its actors."""
        import ray

        self._over.set()
        if self._thread.ident is None:
            ray.shutdown()
        else:
            self._thread.join()

    # ------------------------------------------------------------------------------------- actors
    def _stay(self) -> None:
        """Start Ray, and end it after the run. Ray's processes die with the thread that started them."""
        import ray

        self._start()
        self._over.wait()
        ray.shutdown()

    def _start(self) -> None:
        import ray

        own = self._actors
        try:
            _reach(own.address)
            with _environment(own):
                ray.init(
                    address=own.address or "local",
                    include_dashboard=None if own.address else False,
                    logging_level=logging.INFO if own.verbose else logging.ERROR,
                    log_to_driver=own.verbose,
                )
            self._replaced_handler = True
            made = [self._new_actor() for _ in range(min(own.count, self._room()))]
        except Exception as error:
            # Nothing is lost, since clients then work in this process.
            self._failure = error
            if not own.address:
                log(WARNING, "Ray did not start, and clients work in this process: %s", error)
            return
        self._starting = {actor.ready.remote(): actor for actor in made}

    def _put_back_handler(self) -> None:
        """Put back Python's handler of SIGTERM: Ray's aborts the process three seconds later.

        Only the main thread may do that, so it happens in the first pull after Ray's start.
        """
        if self._replaced_handler and threading.current_thread() is threading.main_thread():
            self._replaced_handler = False
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))

    def _room(self) -> int:
        """Return for how many actors Ray has cores and GPUs, on all machines."""
        import ray

        own = self._actors
        there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        room = math.floor(there.get("CPU", 0.0) / own.cpus)
        if own.gpus:
            cards = there.get("GPU", 0.0)
            shares = cards * math.floor(1 / own.gpus + 1e-9) if own.gpus <= 1 else cards / own.gpus
            room = min(room, math.floor(shares))
        if not room:
            wants = f"a client takes {own.cpus:g} CPU and {own.gpus:g} GPU"
            raise ConfigError(f"{wants}, and Ray has {dict(there)}")
        return room

    def _new_actor(self) -> Any:
        import ray

        own = self._actors
        made = ray.remote(num_cpus=own.cpus, num_gpus=own.gpus)(Clients)
        return made.remote(*self._arguments)

    @property
    def parallel(self) -> bool:
        """Whether actors have taken over from this process, and any is left."""
        self._welcome()
        return self._took_over and bool(self._idle or self._asked or self._starting)

    def _welcome(self) -> None:
        """Take the actors that have become ready; drop those that could not start."""
        if not self._starting:
            return
        import ray

        there, _ = ray.wait(list(self._starting), num_returns=len(self._starting), timeout=0)
        for reference in there:
            actor = self._starting.pop(reference)
            try:
                ray.get(reference)
            except ray.exceptions.RayError as error:
                log(WARNING, "an actor of Ray could not start, and others do its work: %s", error)
            else:
                self._idle.append(actor)
                self._took_over = True

    # ----------------------------------------------------------------------------------- messages
    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there; wait a moment for one if there are none."""
        wanted = list(message_ids)
        self._put_back_handler()
        if not self.parallel:
            self._take_back()
            return super().pull_messages(wanted)
        self._dispatch()
        if not self._replies:
            self._collect()
        return [self._replies.pop(identity) for identity in wanted if identity in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Let all asked clients work, and return the replies that come in time."""
        missing = set(self.push_messages(messages))
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        found: list[Message] = []
        while missing and time.monotonic() < deadline:
            for identity in list(missing):
                if replies := list(self.pull_messages([identity])):
                    missing.remove(identity)
                    found += replies
        self.withdraw(missing)
        return found

    def withdraw(self, message_ids: Iterable[str]) -> None:
        """Withdraw messages; a client that works on one already goes on, and its reply is dropped."""
        unwanted = set(message_ids)
        super().withdraw(unwanted)
        for identity in unwanted:
            self._replies.pop(identity, None)
        self._unwanted |= unwanted & {asked.identity for asked in self._asked.values()}

    def _dispatch(self) -> None:
        """Give each idle actor a message, of a client that no other actor works for."""
        busy = {asked.message.metadata.dst_node_id for asked in self._asked.values()}
        for message in list(self._queue):
            if not self._idle:
                return
            node = message.metadata.dst_node_id
            if node not in busy:
                busy.add(node)
                self._queue.remove(message)
                self._ask(self._idle.pop(0), message)

    def _ask(self, actor: Any, message: Message) -> None:
        import ray

        node, identity = message.metadata.dst_node_id, message.metadata.message_id
        attempt = self._attempts.pop(identity, 0) + 1
        if has_manifest(message):
            digests = read_manifest(message)[0].digests.values()
            self._layers = {
                name: self._layers.get(name) or ray.put(self._store.get(name))
                for name in digests
                if self._store.has(name)
            }
        answer, own = actor.work.options(num_returns=2).remote(
            message,
            self._contexts[node].state,
            self._own.get(node) or self._kept_here(node),
            self._store.identity,
            self._layers,
        )
        self._asked[answer] = _Asked(identity, message, actor, answer, own, attempt)

    def _kept_here(self, node: int) -> dict[str, Tensors]:
        """Return what a client remembered in this process, before actors took over."""
        partition = self._contexts[node].node_config["partition-id"]
        return {k: v for k, v in self._store.own.items() if k.split("/")[1:2] == [str(partition)]}

    def _take_back(self) -> None:
        """Remember here what clients remembered in actors, of which none is left."""
        while self._own:
            import ray

            _, own = self._own.popitem()
            self._store.own.update(ray.get(own))

    def _collect(self) -> None:
        """Wait a moment for a reply, take all that are there, and give their actors new messages."""
        import ray

        awaited = [*self._asked, *self._starting]
        if not awaited:
            return
        ray.wait(awaited, timeout=WAIT_SECONDS)
        there, _ = ray.wait(awaited, num_returns=len(awaited), timeout=0)
        for reference in there:
            if reference in self._starting:
                continue
            asked = self._asked.pop(reference)
            try:
                reply, state = ray.get(reference)
            except ray.exceptions.RayActorError as error:
                actor = self._new_actor()
                self._starting[actor.ready.remote()] = actor
                reply = self._again(asked, error)
            except Exception as error:  # every error of a client becomes that client's reply
                self._idle.append(asked.actor)
                reply = _failed(asked.message, str(error))
            else:
                self._idle.append(asked.actor)
                node = asked.message.metadata.dst_node_id
                self._contexts[node].state, self._own[node] = state, asked.own
            if reply is not None and asked.identity not in self._unwanted:
                self._replies[asked.identity] = reply
            self._unwanted.discard(asked.identity)
        self._welcome()
        self._dispatch()

    def _again(self, asked: _Asked, error: Exception) -> Message | None:
        """Ask a dead actor's message again, or return an error in its place."""
        reason = str(error).strip().partition("\n")[0]
        if asked.attempt < ATTEMPTS and asked.identity not in self._unwanted:
            log(WARNING, "an actor of Ray died; its message is asked again (%s)", reason)
            self._queue.appendleft(asked.message)
            self._attempts[asked.identity] = asked.attempt
            return None
        return _failed(
            asked.message, f"the actor died {asked.attempt} times at this message: {reason}"
        )


def _failed(message: Message, reason: str) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


@contextmanager
def _environment(actors: Actors) -> Iterator[None]:
    """Let Ray's processes find this package, and no other GPU than the one that the run names."""
    changes = {"PYTHONPATH": os.pathsep.join(sys.path)}
    index = torch.device(actors.device).index if actors.device.startswith("cuda:") else None
    if index is not None:
        visible = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
        changes["CUDA_VISIBLE_DEVICES"] = visible[index] if index < len(visible) else str(index)
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
