"""Checks of Flower: its version, its home, what `flwr run` leaves running, and the ports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import requires, version
from itertools import pairwise
from pathlib import Path

from layerfed.doctor.finding import Finding

__all__ = ["flower_home", "flower_version", "installing", "ports", "superlinks"]

VARIABLE = "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"
# Each version of an app's code leaves a folder.
MANY_APPS = 20
# Ports that are expected on this machine, with who listens there.
PORTS = {
    8000: "the SuperLink of `layerfed deploy superlink`",
    9092: "the gateway of `layerfed deploy gateway`",
    9094: "a SuperNode of `layerfed deploy supernode`",
}


def flower_version() -> Iterator[Finding]:
    """Compare Flower's version with the range that LayerFed declares."""
    from packaging.requirements import Requirement  # a library of Flower's

    here, declared = version("flwr"), map(Requirement, requires("layerfed") or ())
    wanted = next(r.specifier for r in declared if r.name == "flwr" and not r.marker)
    if wanted.contains(here, prereleases=True):
        yield Finding("flower", f"Flower {here}")
    else:
        yield Finding(
            "flower",
            f"Flower {here} is not of the versions that LayerFed works with, {wanted}",
            f'pip install "flwr{wanted}"',
            "wrong",
        )


def installing() -> Iterator[Finding]:
    """Look whether `flwr run` would install the app's dependencies for every run."""
    if os.environ.get(VARIABLE) == "1":
        yield Finding("flwr run", "uses this environment")
    else:
        yield Finding(
            "flwr run",
            "makes an environment for every run and installs torch into it (layerfed run and layerfed "
            "deploy do not)",
            f"export {VARIABLE}=1 before the first flwr run",
            "note",
        )


def home() -> Path:
    """Return Flower's home."""
    return Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")


def flower_home() -> Iterator[Finding]:
    """Read the connections in Flower's home, and count the apps that runs left there."""
    place, file = home(), home() / "config.toml"
    try:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        table = tomllib.loads(text).get("superlink", {})
    except (OSError, ValueError) as error:
        advice = f"mend or move away {file}; flwr writes a new one"
        yield Finding("flower home", f"{file} cannot be read: {error}", advice, "wrong")
        return
    connections = {k: v for k, v in table.items() if isinstance(v, dict)}
    lost = {
        name: certificate
        for name, connection in connections.items()
        if (certificate := connection.get("root-certificates"))
        and not Path(file.parent, str(certificate)).exists()
    }
    for name, certificate in lost.items():
        yield Finding(
            "flower home",
            f"{file}: connection {name} names {certificate}, which does not exist",
            "copy the federation's ca.crt there, or remove the connection",
            "wrong",
        )
    apps = list((place / "apps").glob("*")) if (place / "apps").is_dir() else []
    said = f"{place}: {len(connections)} connections, {len(apps)} apps of earlier runs"
    if len(apps) > MANY_APPS:
        advice = f"while no run goes on, old ones may be removed: rm -r {place / 'apps'}"
        yield Finding("flower home", said, advice, "note")
    else:
        yield Finding("flower home", said)


def local_port() -> str:
    """Return the port of the SuperLink that `flwr run` starts and finds again."""
    return os.environ.get("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "39091")


def superlinks() -> Iterator[Finding]:
    """Look for the SuperLink that `flwr run` has left, which keeps environment and folder."""
    listed = subprocess.run(
        ["ps", "-ww", "-u", str(os.getuid()), "-o", "pid=,args="],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    rows = [line.split() for line in listed.stdout.splitlines()]
    # One that serves another port is not the one that the next `flwr run` finds.
    stray = [
        (int(pid), args)
        for pid, *args in rows
        if any(a.endswith("flower-superlink") for a in args[:2])
        and "--simulation" in args
        and ("--port", local_port()) in pairwise(args)
    ]
    for pid, args in stray:
        # Its script runs in the interpreter beside it.
        script = next(a for a in args[:2] if a.endswith("flower-superlink"))
        same = Path(script).parent.resolve() == Path(sys.executable).parent.absolute().resolve()
        try:
            folder = f", in {Path(f'/proc/{pid}/cwd').readlink()}"
        except OSError:
            folder = ""
        yield Finding(
            "superlink",
            f"process {pid} is the SuperLink of an earlier flwr run{folder}"
            + f", of another environment: {script}" * (not same),
            f"the next flwr run uses it, with its environment and folder; for a new one: kill {pid}",
            "note" if same else "wrong",
        )
    if not stray:
        yield Finding("superlink", "none is left by flwr run")


def listens(port: int) -> bool:
    """Return whether something listens on a loopback port."""
    with socket.socket() as there:
        there.settimeout(1.0)
        return there.connect_ex(("127.0.0.1", port)) == 0


def ports() -> Iterator[Finding]:
    """Look which of the ports of LayerFed and Flower are in use."""
    named = {**PORTS, int(local_port()): "the local SuperLink of flwr run"}
    used = {port: who for port, who in named.items() if listens(port)}
    for port, who in used.items():
        yield Finding(
            "ports",
            f"something listens on port {port}",
            f"right if it is {who}; if not, choose another --port (or "
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT)",
            "note",
        )
    if free := [str(port) for port in named if port not in used]:
        yield Finding("ports", f"free: {', '.join(free)}")
