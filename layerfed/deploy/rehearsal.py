"""A whole federation on loopback, with TLS, authentication and a process for each node.

All its processes end with it. `layerfed deploy demo` compares one with the simulation of the same seed,
and the tests use it too.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Self

import httpx
import numpy as np
from safetensors.numpy import load_file

from layerfed.config import RunConfig, Scalar
from layerfed.deploy import node_process
from layerfed.deploy.credentials import create_node_key
from layerfed.deploy.federation import Federation, environment, program, supernode_command
from layerfed.deploy.processes import Processes, free_ports
from layerfed.runs import read_lines

__all__ = ["Comparison", "Loopback", "on_loopback"]

NodeSettings = Mapping[str, Scalar]
# A generous limit: every process of Flower takes seconds to start, and the machine may be busy.
START_SECONDS = 180.0
# The order of replies changes the last bit of sums of updates, and another kind of CPU may round a
# gradient differently.
WEIGHTS = 1e-5


@dataclass
class Loopback:
    """A running federation on loopback.

    Attributes
    ----------
    federation : Federation
    folder : Path
        The folder that holds the federation's folder and one for each node.
    processes : Processes
    superlink, gateway : str
        HOST:PORT.
    server, door : Popen
        The present processes of SuperLink and gateway.
    """

    federation: Federation
    folder: Path
    processes: Processes
    superlink: str
    gateway: str
    server: Popen[bytes] = field(init=False)
    door: Popen[bytes] = field(init=False)

    def start_superlink(self) -> None:
        """Start the SuperLink, or a new one on its port and database, and wait until it answers."""
        port = int(self.superlink.rpartition(":")[2])
        self.server = self._started("superlink", self.federation.superlink_command(port))
        self._wait_for("SuperLink", self.superlink)

    def start_gateway(self) -> None:
        """Start the gateway, or a new one on its port, and wait until it answers."""
        port = self.gateway.rpartition(":")[2]
        where = ["--dir", str(self.federation.folder), "--superlink", self.superlink]
        command = [program("layerfed"), "deploy", "gateway", *where]
        self.door = self._started("gateway", [*command, "--host", "127.0.0.1", "--port", port])
        self._wait_for("gateway", self.gateway)

    def _started(self, name: str, command: Sequence[str]) -> Popen[bytes]:
        logs = len(list(self.processes.logs.glob(f"{name}*.log")))
        own = f"{name}-{logs + 1}" if logs else name
        return self.processes.start(own, command, environment(self.federation.flower_home))

    def _wait_for(self, what: str, address: str) -> None:
        context = ssl.create_default_context(cafile=str(self.federation.ca))

        def answers() -> bool:
            try:
                httpx.get(f"https://{address}/health", verify=context, trust_env=False)
            except httpx.TransportError:
                return False
            return True

        self.processes.wait(f"the {what} answers", answers, START_SECONDS)

    def start_node(
        self,
        name: str,
        settings: NodeSettings,
        *,
        register: bool = True,
        ca: Path | None = None,
        door: str | None = None,
        options: Sequence[str] = (),
        keep_model: bool = True,
    ) -> Popen[bytes]:
        """Start a SuperNode as on a machine of its own, with further options of `flower-supernode`.

        `register` and `ca` serve tests of nodes that must be refused. `door` is the address that the
        node connects to, by default the gateway.
        """
        home = self.folder / name
        settings = {"store": str(home / "layers"), **settings}
        key, public = create_node_key(name, home)
        if register:
            self.federation.register(public)
        (port,) = free_ports(1)
        command = supernode_command(
            door or self.gateway, ca or self.federation.ca, key, settings, port
        )
        command = [*command, *options]
        if keep_model:
            command = node_process.command(command)
        return self.processes.start(name, command, environment(home / "flower"))

    def start_run(self, app: Path, config: RunConfig) -> int:
        """Hand a run to the SuperLink, with a layer store that no node reads, and return its id."""
        store = {"store": str(self.federation.folder / "layers")}
        section = config.exchange.model_copy(update=store)
        return self.federation.start_run(app, config.model_copy(update={"exchange": section}))


@contextmanager
def on_loopback(
    folder: Path,
    nodes: Sequence[NodeSettings],
    say: Callable[[str], None] = lambda text: None,
    *,
    logs: Path | None = None,
    keep_model: bool = True,
) -> Iterator[Loopback]:
    """Run SuperLink, gateway and a SuperNode for each of `nodes`, until the context ends.

    Parameters
    ----------
    folder : Path
        An empty folder for the federation.
    nodes : Sequence[Mapping[str, Scalar]]
        Settings of each node, as in `flower-supernode --node-config`.
    say : Callable[[str], None], optional
        Called with a line for each step.
    logs : Path, optional
        Folder for the log of each process; by default `folder`/logs.
    keep_model : bool (default: True)
        Whether each node keeps its model in a process between messages.

    Raises
    ------
    DeploymentFailed
        If a process does not start. The message has the last lines of its log.
    """
    say("certificates, and a key for each node")
    federation = Federation(folder.resolve() / "server")
    federation.create_certificates([], days=2)
    superlink_port, gateway_port = free_ports(2)
    superlink, gateway = f"127.0.0.1:{superlink_port}", f"127.0.0.1:{gateway_port}"
    with Processes(logs or folder / "logs") as processes:
        loopback = Loopback(federation, folder, processes, superlink, gateway)
        say(f"SuperLink on {superlink}, with TLS, SuperNode authentication and a database")
        loopback.start_superlink()
        loopback.start_gateway()
        say(f"gateway on {gateway}, the one door for nodes")
        for number, settings in enumerate(nodes):
            listed = ", ".join(f"{k}={v}" for k, v in settings.items())
            say(f"SuperNode {number + 1} of {len(nodes)}: {listed}")
            loopback.start_node(f"node-{number}", settings, keep_model=keep_model)
        processes.wait(
            "all SuperNodes are connected",
            lambda: federation.online() >= len(nodes),
            START_SECONDS,
        )
        say("all SuperNodes are connected")
        yield loopback


@dataclass(frozen=True)
class Comparison:
    """The comparison of two runs of the same configuration.

    Attributes
    ----------
    masks : bool
        Whether every round chose the same layers for the same clients.
    weights : float
        Largest absolute difference of a weight of the final models.
    accuracies : tuple[float, float]
        Both runs' final accuracies.
    """

    masks: bool
    weights: float
    accuracies: tuple[float, float]

    @property
    def same(self) -> bool:
        """Whether the two runs are equal."""
        return self.masks and self.weights <= WEIGHTS

    @classmethod
    def of(cls, first: Path, second: Path) -> Self:
        """Compare two run folders."""
        chosen = [
            [(row["clients"], row["masks"]) for row in read_lines(folder / "selection.jsonl")]
            for folder in (first, second)
        ]
        one, two = (load_file(folder / "final.safetensors") for folder in (first, second))
        return cls(
            masks=chosen[0] == chosen[1],
            weights=max(
                (
                    float(np.abs(one[n].astype(np.float64) - two[n]).max())
                    for n in one.keys() & two.keys()
                    if one[n].size
                ),
                default=0.0,
            ),
            accuracies=(_accuracy(first), _accuracy(second)),
        )


def _accuracy(folder: Path) -> float:
    return float(read_lines(folder / "metrics.jsonl")[-1]["accuracy"])
