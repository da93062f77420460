"""`layerfed deploy`: certificates, key, superlink, gateway, register, supernode, run, demo."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from layerfed.config import ConfigError, RunConfig, load_config, parse_override
from layerfed.config.command_line import App, complete_setting, read_settings

if TYPE_CHECKING:
    from layerfed.deploy.federation import Federation

__all__ = ["app"]

app = App(
    help="Run on real machines, with TLS and authentication; docs/deployment.md is the guide.",
    no_args_is_help=True,
    mendable=(OSError,),  # the federation's folder is its owner's alone
)
console = Console(stderr=True, emoji=False)

Folder = Annotated[
    Path, typer.Option("--dir", help="The federation's folder on the server", file_okay=False)
]
FOLDER = Path("federation")


def _federation(folder: Path) -> Federation:
    from layerfed.deploy.federation import Federation

    return Federation(folder.resolve())


@app.command()
def certificates(
    hosts: Annotated[
        list[str], typer.Argument(help="Names and addresses by which nodes reach the server")
    ],
    folder: Folder = FOLDER,
    days: Annotated[
        int, typer.Option(help="How long the server's certificate is valid", min=1, max=3650)
    ] = 365,
) -> None:
    """On the server: make the authority once, and the server's certificate each time."""
    federation = _federation(folder)
    federation.create_certificates(hosts, days)
    typer.echo(f"{federation.ca}: copy it to every node")
    typer.echo(f"{federation.ca_key}: keep it offline; only renewals need it")
    typer.echo(f"{federation.certificate}: valid for {days} days")


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Name of the node")],
    folder: Annotated[Path, typer.Option("--dir", help="Folder for the key pair")] = Path(),
) -> None:
    """On a node: create its key pair."""
    from layerfed.deploy.credentials import create_node_key

    private, public = create_node_key(name, folder)
    typer.echo(f"{private}: stays on this node")
    typer.echo(f"{public}: send it to the server, for `layerfed deploy register`")


@app.command()
def superlink(
    folder: Folder = FOLDER,
    port: Annotated[int, typer.Option(help="Loopback port", min=1, max=65535)] = 8000,
) -> None:
    """On the server: run the SuperLink, on loopback, with a database that outlives it."""
    from layerfed.deploy.federation import environment

    federation = _federation(folder)
    command = federation.superlink_command(port)
    os.umask(0o077)  # the database holds updates; others may read a folder that was there before
    # The same process from here on: signals reach it, and its exit status is this command's.
    os.execve(command[0], command, environment(federation.flower_home))


@app.command()
def gateway(
    folder: Folder = FOLDER,
    host: Annotated[str, typer.Option(help="Address to listen on")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="Port that nodes connect to", min=1, max=65535)] = 9092,
    superlink: Annotated[str, typer.Option(help="HOST:PORT of the SuperLink")] = "127.0.0.1:8000",
) -> None:
    """On the server: run the gateway, which passes only SuperNodes' calls on to the SuperLink."""
    from layerfed.deploy.gateway import serve_gateway

    federation = _federation(folder)
    federation.require_certificates()
    if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}", superlink):
        raise ConfigError(f"--superlink {superlink} is not allowed: it should be HOST:PORT")
    serve_gateway(superlink, federation.ca, federation.certificate, federation.key, host, port)


@app.command()
def register(
    public_keys: Annotated[
        list[Path], typer.Argument(help="The nodes' NAME.pub", exists=True, dir_okay=False)
    ],
    folder: Folder = FOLDER,
) -> None:
    """On the server: let nodes join by their public keys."""
    federation = _federation(folder)
    for public_key in public_keys:
        typer.echo(f"{public_key}: node {federation.register(public_key)}")


@app.command()
def supernode(
    superlink: Annotated[str, typer.Argument(help="HOST:PORT of the server's gateway")],
    settings: Annotated[
        list[str],
        typer.Argument(
            help="The node's own settings: partition-id=0 budget=2 …", metavar="KEY=VALUE…"
        ),
    ],
    ca: Annotated[Path, typer.Option(help="The federation's ca.crt")] = Path("ca.crt"),
    key: Annotated[Path, typer.Option(help="The node's private key")] = Path("node.key"),
    home: Annotated[Path, typer.Option(help="Flower's folder for the apps it runs")] = Path(
        "flower"
    ),
    port: Annotated[
        int,
        typer.Option(help="Loopback port; another for each node of a machine", min=1, max=65535),
    ] = 9094,
    keep_model: Annotated[
        bool,
        typer.Option(
            help="Keep model and data in a process of the node, or load them for every message"
        ),
    ] = True,
    free_after: Annotated[
        float,
        typer.Option(
            help="Seconds without a message after which their memory is freed; 0 for never", min=0
        ),
    ] = 0.0,
) -> None:
    """On a node: run its SuperNode."""
    from layerfed.deploy import node_process
    from layerfed.deploy.federation import environment, supernode_command

    node_config = dict(parse_override(setting) for setting in settings)
    command = supernode_command(superlink, ca, key, node_config, port)
    if keep_model:
        command = node_process.command(command, free_after)
    elif free_after:
        raise ConfigError("--free-after frees a model that is kept; leave out --no-keep-model")
    variables = environment(home.resolve())
    os.execve(command[0], command, variables)


@app.command()
def run(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="As in `layerfed run`: a file, then key=value",
            metavar="[CONF] [KEY=VALUE]…",
            autocompletion=complete_setting,
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="A run folder of this server to continue, from its last checkpoint"),
    ] = None,
    folder: Folder = FOLDER,
    app_folder: Annotated[
        Path, typer.Option("--app", help="The Flower app: a clone of this repository")
    ] = Path(),
) -> None:
    """On the server: run on the connected nodes, show the log, and exit 0 only if the run completed."""
    from layerfed.runs.signals import clean_up_on_sigterm
    from layerfed.strategies import checked
    from layerfed.task import task_named

    clean_up_on_sigterm()
    federation, config = _federation(folder), checked(read_settings(settings, resume))
    task_named(config.task.name)
    identity = federation.start_run(app_folder, config)
    console.print(f"run {identity}; Ctrl-C leaves it running", highlight=False)
    status = federation.follow(identity)
    _print_status(identity, status.status, status.details)
    raise typer.Exit(0 if status.completed else 1)


def _print_status(run: int, status: str, details: str) -> None:
    console.print(f"run {run} {status} {escape(details)}", highlight=False, soft_wrap=True)


@app.command()
def demo(
    nodes: Annotated[int, typer.Option(help="SuperNodes, of budgets 1, 2, …", min=1, max=12)] = 4,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    directory: Annotated[
        Path, typer.Option("--runs", help="Folder for the two run folders and the logs")
    ] = Path("runs"),
    timeout: Annotated[float, typer.Option(help="Seconds for the rounds", min=1)] = 1800.0,
) -> None:
    """On one machine: rehearse a deployment on loopback, and compare it with the simulation."""
    import layerfed
    from layerfed.deploy.federation import DeploymentFailed
    from layerfed.deploy.rehearsal import Comparison, on_loopback
    from layerfed.engine import run_on
    from layerfed.runs.signals import clean_up_on_sigterm

    began, folder = time.monotonic(), directory.resolve() / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    logging.getLogger("flwr").setLevel(logging.WARNING)
    clean_up_on_sigterm()

    def say(text: str) -> None:
        passed = f"{time.monotonic() - began:5.0f} s"
        console.print(f"[dim]{passed}[/]  {escape(text)}", highlight=False, soft_wrap=True)

    def configured(name: str) -> RunConfig:
        return load_config(
            None,
            [
                f"federation.clients={nodes}",
                f"federation.clients-per-round={nodes}",
                f"federation.min-replies={nodes}",
                f"federation.rounds={rounds}",
                "federation.timeout=600",
                "budget.kind=per-node",
                "run.device=cpu",
                f"run.seed={seed}",
                f"run.dir={folder}",
                f"run.name={name}",
            ],
        )

    source = Path(layerfed.__file__).resolve().parents[1]
    if not (source / "pyproject.toml").exists():
        raise ConfigError("the demo hands Flower the app itself, so it needs a clone, not a wheel")
    budgets = [{"budget": 1 + i} for i in range(nodes)]
    say(f"simulation: {nodes} clients, {rounds} rounds")
    simulated = run_on("inprocess", configured("simulated"), nodes=budgets)
    settings = [
        {"partition-id": i, "num-partitions": nodes, **own} for i, own in enumerate(budgets)
    ]
    # Keys and certificates of a rehearsal are nobody's; only the logs stay.
    with (
        tempfile.TemporaryDirectory(prefix="layerfed-demo-") as private,
        on_loopback(Path(private), settings, say, logs=folder / "logs") as loopback,
    ):
        identity = loopback.start_run(source, configured("deployed"))
        say(f"run {identity} on the SuperNodes; logs are in {folder / 'logs'}")
        status = loopback.federation.follow(identity, timeout)
        if not status.completed:
            raise DeploymentFailed(f"run {identity} {status.status}: {status.details}")
        say("stopping")
    found = Comparison.of(simulated, folder / "deployed")
    say("stopped")
    typer.echo(f"{'':12}{'accuracy':>10}   run folder")
    for name, accuracy in zip(("simulated", "deployed"), found.accuracies, strict=True):
        typer.echo(f"{name:12}{accuracy:>10.2%}   {folder / name}")
    typer.echo(f"masks {'identical' if found.masks else 'DIFFER'}")
    typer.echo(f"final weights differ by at most {found.weights:.1e}")
    raise typer.Exit(0 if found.same else 1)
