"""A federation's folder on the server, and the Flower commands that work on it.

The folder holds everything that the server keeps: the authority and the server's certificate, the
SuperLink's database, a Flower home of its own (which keeps the user's other federations apart), and the
runs.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerfed.config import ConfigError, Flat, NodeConfig, RunConfig, Scalar, run_keys
from layerfed.config.errors import Failed
from layerfed.config.paths import absolute, expanded
from layerfed.deploy.credentials import create_authority, create_server_certificate
from layerfed.files import whole
from layerfed.strategies import option_keys

__all__ = [
    "DeploymentFailed",
    "Federation",
    "RunStatus",
    "environment",
    "known_to_flower",
    "program",
    "supernode_command",
]

CONNECTION = "federation"
# The limit for a `flwr` command, which usually gets the SuperLink's answer in a second or two.
COMMAND_SECONDS = 120.0
POLL_SECONDS, STATUS_SECONDS = 1.0, 15.0
# A busy SuperLink may leave some questions for a run's status unanswered.
MOST_UNANSWERED = 5


class DeploymentFailed(Failed):
    """A process or a command of the deployment failed; the message says which, and what it said."""


def program(name: str) -> str:
    """Return the path of a command of this Python environment, or of one that PATH names.

    Raises
    ------
    ConfigError
        If there is none.
    """
    user = sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))  # `pip --user`
    beside = (Path(sys.executable).parent, sysconfig.get_path("scripts"), user)
    places = os.pathsep.join([*map(str, beside), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=places)
    if found is None:
        raise ConfigError(f"there is no command `{name}` beside {sys.executable} or in PATH")
    return found


def environment(flower_home: Path) -> dict[str, str]:
    """Return the environment for Flower's commands: no telemetry, no installation, its own home."""
    beside = str(Path(sys.executable).parent)
    return {
        **os.environ,
        # Flower starts its workers by name.
        "PATH": os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]),
        "FLWR_HOME": str(flower_home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # Otherwise every run builds a new environment, torch included.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


def supernode_command(
    superlink: str, ca: Path, key: Path, node_config: Mapping[str, Scalar], port: int
) -> list[str]:
    """Return the command that starts a node's SuperNode.

    Parameters
    ----------
    superlink : str
        HOST:PORT of the server's gateway.
    ca : Path
        Certificate of the federation's authority.
    key : Path
        The node's private key.
    node_config : Mapping[str, Scalar]
        The node's settings, as in `NodeConfig`.
    port : int
        Loopback port between the SuperNode and its workers; each SuperNode of a machine needs its own.

    Raises
    ------
    ConfigError
        If a setting is wrong or a file does not exist.
    """
    NodeConfig.read(node_config)
    for what, file in (("--ca", ca), ("--key", key)):
        if not file.is_file():
            raise ConfigError(f"{what} {file}: there is no such file")
    if quoted := [k for k, v in node_config.items() if isinstance(v, str) and not _plain(v)]:
        raise ConfigError(
            f"{quoted[0]} = {node_config[quoted[0]]!r}: Flower takes no quotes and backslashes there"
        )
    settings = " ".join(f"{k}={json.dumps(v)}" for k, v in node_config.items())
    return [
        program("flower-supernode"),
        *("--superlink", superlink),
        *("--root-certificates", str(ca)),
        *("--auth-supernode-private-key", str(key)),
        *("--node-config", settings),
        *("--port", str(port)),
    ]


def _plain(text: str) -> bool:
    return text.isprintable() and not set(text) & set("\"'\\")


@dataclass(frozen=True)
class RunStatus:
    """The SuperLink's status of a run: pending, starting, running, or finished with an outcome."""

    status: str
    details: str

    @property
    def finished(self) -> bool:
        """Whether the run has ended, with any outcome."""
        return self.status.startswith("finished")

    @property
    def completed(self) -> bool:
        """Whether the run has ended successfully."""
        return self.status == "finished:completed"


def known_to_flower(config: RunConfig) -> Flat:
    """Return a run's settings under keys that the app declares; Flower refuses others.

    Settings of a task or strategy that is not LayerFed's own go into `task.options` and
    `strategy.options`.
    """
    declared, flat = {*run_keys(), *option_keys()}, config.to_flat()
    known = {k: v for k, v in flat.items() if k in declared}
    for section, own in (("task", config.task.own), ("strategy", config.strategy.own)):
        names = {k.partition(".")[2]: v for k, v in flat.items() if k.startswith(f"{section}.")}
        own |= {k: v for k, v in names.items() if f"{section}.{k}" not in declared}
        known[f"{section}.options"] = shlex.join(f"{k}={json.dumps(v)}" for k, v in own.items())
    return known


@dataclass(frozen=True)
class Federation:
    """The folder of a federation on its server.

    Attributes
    ----------
    folder : Path
        The folder's absolute path.
    """

    folder: Path

    @property
    def ca(self) -> Path:
        """The authority's certificate, of which every node gets a copy."""
        return self.folder / "ca.crt"

    @property
    def ca_key(self) -> Path:
        """The authority's key, which is needed only to renew the server's certificate."""
        return self.folder / "ca.key"

    @property
    def certificate(self) -> Path:
        """The server's certificate."""
        return self.folder / "server.crt"

    @property
    def key(self) -> Path:
        """The server's private key."""
        return self.folder / "server.key"

    @property
    def flower_home(self) -> Path:
        """Flower's home, with its connection to the SuperLink and the apps that ran."""
        return self.folder / "flower"

    @property
    def runs(self) -> Path:
        """The default folder for run folders."""
        return self.folder / "runs"

    def create_certificates(self, hosts: Sequence[str], days: int) -> None:
        """Create the authority if it does not exist, and the server's certificate for these hosts."""
        # The database holds messages in transit, updates among them.
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        pair = (self.ca, self.ca_key)
        here = [file for file in pair if file.exists()]
        if not here:
            create_authority(*pair)
        elif len(here) == 1:
            (absent,) = {*pair} - {*here}
            raise ConfigError(
                f"{here[0]} is here and {absent.name} is not: bring {absent.name} back to renew the "
                "server's certificate; a new authority would be one that no node trusts"
            )
        create_server_certificate((self.ca, self.ca_key), self.certificate, self.key, hosts, days)

    def require_certificates(self) -> None:
        """Refuse a folder without certificates."""
        if absent := [f.name for f in (self.ca, self.certificate, self.key) if not f.exists()]:
            raise ConfigError(
                f"{self.folder} has no {', '.join(absent)}; make them with "
                "`layerfed deploy certificates HOST`, HOST being the server's name or address"
            )

    def superlink_command(self, port: int) -> list[str]:
        """Return the command that starts the SuperLink on loopback, and note its port for `flwr`."""
        self.require_certificates()
        self.flower_home.mkdir(parents=True, exist_ok=True)
        text = (
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{port}"\nroot-certificates = {json.dumps(str(self.ca))}\n'
        )
        with whole(self.flower_home / "config.toml") as beside:
            beside.write_text(text, encoding="utf-8")
        return [
            program("flower-superlink"),
            *("--ssl-ca-certfile", str(self.ca)),
            *("--ssl-certfile", str(self.certificate)),
            *("--ssl-keyfile", str(self.key)),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            *("--database", str(self.folder / "state.db")),
            *("--host", "127.0.0.1", "--port", str(port)),
        ]

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """Run a `flwr` command on this federation's SuperLink and return its answer.

        Raises
        ------
        DeploymentFailed
            If the command fails. The message has its output.
        """
        if not (self.flower_home / "config.toml").exists():
            raise ConfigError(
                f"{self.folder}: no SuperLink was started from there; `layerfed deploy superlink` does"
            )
        command = [program("flwr"), *arguments, "--format", "json"]
        try:
            done = subprocess.run(
                command,
                env=environment(self.flower_home),
                capture_output=True,
                text=True,
                timeout=COMMAND_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise DeploymentFailed(
                f"`flwr {' '.join(arguments[:2])}` got no answer in {COMMAND_SECONDS:g} s"
            ) from None
        answer = _last_object(done.stdout)
        if done.returncode or not answer.get("success"):
            said = answer.get("error-message") or (done.stdout + done.stderr).strip()[-500:]
            raise DeploymentFailed(f"`flwr {' '.join(arguments[:2])}` failed: {said}")
        return answer

    def register(self, public_key: Path) -> int:
        """Register a node's public key and return the node's id in Flower."""
        answer = self.flwr("supernode", "register", str(public_key), CONNECTION)
        return int(answer["node-id"])

    def nodes(self) -> list[dict[str, Any]]:
        """Return the SuperLink's entry of each registered node."""
        found: list[dict[str, Any]] = self.flwr("supernode", "list", CONNECTION)["nodes"]
        return found

    def online(self) -> int:
        """Return the number of connected nodes."""
        return sum(node["status"] == "online" for node in self.nodes())

    def start_run(self, app: Path, config: RunConfig) -> int:
        """Hand a run to the SuperLink and return its id.

        Raises
        ------
        ConfigError
            If a setting is a path of the current folder, in which neither server nor nodes work.
        """
        here, elsewhere = config.to_flat(), absolute(config.to_flat())
        for key, path in elsewhere.items():
            place = str(here[key]).removeprefix("transformers/")
            relative = path != here[key] and not place.startswith(("/", "~"))
            if key != "run.dir" and relative:
                raise ConfigError(
                    f"{key} = '{here[key]}' is a path of this folder, and server and nodes work in "
                    f"others; give it in full ({path}), as it is on them"
                )
        settings = known_to_flower(config)
        settings["run.dir"] = str(
            expanded(config.run.dir).resolve() if config.run.dir else self.runs
        )
        # The ServerApp's working directory is that of the SuperLink.
        if config.run.resume:
            settings["run.resume"] = str(expanded(config.run.resume).resolve())
        # Settings go into a file, since Flower's command line cuts a value at a space or a quote.
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "run.toml"
            lines = (f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in settings.items())
            file.write_text("".join(lines), encoding="utf-8")
            answer = self.flwr("run", str(app), CONNECTION, "--run-config", str(file))
        return int(answer["run-id"])

    def status(self, run: int) -> RunStatus:
        """Return a run's status."""
        (row,) = self.flwr("list", CONNECTION, "--run-id", str(run))["runs"]
        return RunStatus(row["status"], row["status-details"])

    def follow(self, run: int, timeout: float | None = None) -> RunStatus:
        """Show a run's log until the run ends, and return its status.

        Raises
        ------
        DeploymentFailed
            If the run has not ended after `timeout` seconds, or the SuperLink does not answer any more.
        """
        unanswered = 0
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        stream = subprocess.Popen(
            [program("flwr"), "log", str(run), CONNECTION, "--stream"],
            env={**environment(self.flower_home), "PYTHONUNBUFFERED": "1"},
        )
        try:
            # The log ends with the run. Asking for the status takes seconds of a core, so it is rare.
            while True:
                try:
                    status, unanswered = self.status(run), 0
                except DeploymentFailed as error:
                    unanswered += 1
                    if unanswered >= MOST_UNANSWERED:
                        raise DeploymentFailed(
                            f"{error}; run {run} may go on: `layerfed watch` shows it on the server"
                        ) from None
                else:
                    if status.finished:
                        break
                if time.monotonic() > deadline:
                    raise DeploymentFailed(f"run {run} has not ended after {timeout:g} s")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    stream.wait(STATUS_SECONDS)
                    time.sleep(POLL_SECONDS)
            with contextlib.suppress(subprocess.TimeoutExpired):
                stream.wait(STATUS_SECONDS)  # the last lines
            return status
        finally:
            stream.terminate()
            try:
                stream.wait(STATUS_SECONDS)
            except subprocess.TimeoutExpired:
                stream.kill()


def _last_object(text: str) -> dict[str, Any]:
    """Return the JSON object at the end of a command's output."""
    start = text.find("{")
    while start >= 0:
        try:
            found = json.loads(text[start:])
        except json.JSONDecodeError:
            start = text.find("{", start + 1)
            continue
        return found if isinstance(found, dict) else {}
    return {}
