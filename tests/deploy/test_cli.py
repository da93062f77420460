"""`layerfed deploy` starts the right commands, reports errors in a line, and tells how a run ended."""

from __future__ import annotations

import json
import os
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from layerfed.cli import app
from layerfed.config import ConfigError, RunConfig, load_config
from layerfed.deploy.credentials import create_node_key
from layerfed.deploy.federation import (
    DeploymentFailed,
    Federation,
    RunStatus,
    environment,
    program,
    supernode_command,
)


def deploy(*words: object) -> Result:
    return CliRunner().invoke(app, ["deploy", *map(str, words)], env={"COLUMNS": "300"})


@pytest.fixture
def masks() -> list[int]:
    """The file modes that the command would have kept from others."""
    return []


@pytest.fixture
def started(
    monkeypatch: pytest.MonkeyPatch, masks: list[int]
) -> list[tuple[list[str], dict[str, str]]]:
    """The command that would have replaced this process."""
    calls: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "umask", masks.append)
    monkeypatch.setattr(os, "execve", lambda file, command, env: calls.append((command, env)))
    return calls


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    made = Federation(tmp_path / "federation")
    made.create_certificates([], days=1)
    return made


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


# ------------------------------------------------------------------------------- the server
def test_certificates_land_in_a_folder_of_the_owners(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    done = deploy("certificates", "fed.example.org", "--dir", folder)
    assert done.exit_code == 0, done.output
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {f.name for f in folder.iterdir()} == {"ca.crt", "ca.key", "server.crt", "server.key"}
    assert "copy it to every node" in done.output


def test_the_superlink_listens_on_loopback_with_tls_and_authentication(
    federation: Federation, started: list[tuple[list[str], dict[str, str]]], masks: list[int]
) -> None:
    assert deploy("superlink", "--dir", federation.folder, "--port", 8123).exit_code == 0
    assert masks == [0o077], "the database is its owner's, also in a folder that others can read"
    ((command, variables),) = started
    assert Path(command[0]).name == "flower-superlink"
    assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation"} < set(command)
    assert "--insecure" not in command
    assert (option(command, "--host"), option(command, "--port")) == ("127.0.0.1", "8123")
    assert option(command, "--ssl-keyfile") == str(federation.key)
    assert option(command, "--database") == str(federation.folder / "state.db")
    assert variables["FLWR_HOME"] == str(federation.flower_home)
    connection = tomllib.loads((federation.flower_home / "config.toml").read_text())
    assert connection["superlink"]["federation"] == {
        "address": "127.0.0.1:8123",
        "root-certificates": str(federation.ca),
    }


@pytest.mark.parametrize("command", ["superlink", "gateway"])
def test_without_certificates_nothing_starts(
    command: str, tmp_path: Path, started: list[tuple[list[str], dict[str, str]]]
) -> None:
    done = deploy(command, "--dir", tmp_path)
    assert done.exit_code == 2
    assert "make them with `layerfed deploy certificates HOST`" in done.output
    assert not started


def test_the_environment_finds_flower_and_installs_nothing(tmp_path: Path) -> None:
    variables = environment(tmp_path)
    assert (Path(variables["PATH"].split(os.pathsep)[0]) / "flower-superexec").exists()
    assert variables["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"


# --------------------------------------------------------------------------------- the node
def test_a_supernode_starts_with_its_key_and_settings(
    federation: Federation, tmp_path: Path, started: list[tuple[list[str], dict[str, str]]]
) -> None:
    key, _ = create_node_key("a", tmp_path)
    files = ["--ca", federation.ca, "--key", key, "--home", tmp_path / "flower"]
    settings = ["partition-id=1", "budget=2", "device=cpu"]
    done = deploy("supernode", "fed.example.org:9092", *files, "--port", 9100, *settings)
    assert done.exit_code == 0, done.output
    ((command, variables),) = started
    keeping, command = command[: command.index("--")], command[command.index("--") + 1 :]
    assert keeping[1:] == ["-m", "layerfed.deploy.node_process", "--free-after", "0"]
    assert Path(command[0]).name == "flower-supernode"
    assert option(command, "--superlink") == "fed.example.org:9092"
    assert option(command, "--root-certificates") == str(federation.ca)
    assert option(command, "--auth-supernode-private-key") == str(key)
    assert option(command, "--node-config") == 'partition-id=1 budget=2 device="cpu"'
    assert option(command, "--port") == "9100"
    assert "--insecure" not in command
    assert variables["FLWR_HOME"] == str(tmp_path / "flower")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["partition-id=0", "budget=many"], "budget = 'many' is not allowed"),
        (["budget=1"], "this node has no partition"),
        (["partition-id"], "'partition-id' is not of the form key=value"),
    ],
)
def test_a_wrong_setting_is_told_before_anything_starts(
    settings: list[str],
    told: str,
    federation: Federation,
    started: list[tuple[list[str], dict[str, str]]],
) -> None:
    done = deploy("supernode", "h:1", "--ca", federation.ca, "--key", federation.key, *settings)
    assert done.exit_code == 2
    assert told in done.output
    assert not started


def test_a_missing_file_is_told(federation: Federation, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--key .*none\.key: there is no such file"):
        supernode_command("h:1", federation.ca, tmp_path / "none.key", {"partition-id": 0}, 1)


# --------------------------------------------------------------------------------- the runs
def test_a_run_travels_with_every_setting(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, Any] = {}

    def flwr(self: Federation, *words: str) -> dict[str, Any]:
        sent.update(tomllib.loads(Path(words[words.index("--run-config") + 1]).read_text()))
        return {"run-id": "7"}

    monkeypatch.setattr(Federation, "flwr", flwr)
    monkeypatch.chdir(federation.folder)
    settings = ["run.name=it-is", "strategy.consistency=0.25", "model.head=a b", "run.resume=r"]
    config = load_config(None, settings)
    assert federation.start_run(Path(), config) == 7
    flat = {f"{section}.{key}": v for section, keys in sent.items() for key, v in keys.items()}
    assert flat.pop("run.dir") == str(federation.runs)
    assert flat["run.resume"] == str(federation.folder / "r"), "the SuperLink runs elsewhere"
    flat["run.resume"] = "r"
    assert RunConfig.from_flat(flat) == config


@pytest.mark.parametrize(
    ("status", "code"), [("finished:completed", 0), ("finished:failed", 1), ("finished:stopped", 1)]
)
def test_the_exit_status_is_that_of_the_run(
    status: str, code: int, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Federation, "start_run", lambda self, app, config: 7)
    monkeypatch.setattr(Federation, "follow", lambda self, run: RunStatus(status, "too few"))
    done = deploy("run", "--dir", federation.folder, "federation.rounds=1")
    assert done.exit_code == code
    assert f"run 7 {status} too few" in done.output


def test_a_run_is_resumed_with_its_own_configuration(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[RunConfig] = []

    def start(self: Federation, app: Path, config: RunConfig) -> int:
        sent.append(config)
        return 7

    monkeypatch.setattr(Federation, "start_run", start)
    monkeypatch.setattr(Federation, "follow", lambda self, run: RunStatus("finished:completed", ""))
    config = load_config(None, ["federation.rounds=4", "strategy.name=top", "run.seed=3"])
    (tmp_path / "config.json").write_text(json.dumps(config.to_flat()))
    monkeypatch.chdir(tmp_path)
    done = deploy("run", "--dir", federation.folder, "--resume", ".", "federation.rounds=9")
    assert done.exit_code == 0, done.output
    expected = {**config.to_flat(), "federation.rounds": 9, "run.resume": str(tmp_path.resolve())}
    assert sent[0].to_flat() == expected
    both = deploy("run", "conf/default.toml", "--dir", federation.folder, "--resume", tmp_path)
    assert both.exit_code == 2
    assert "leave out conf/default.toml" in both.output


def test_a_wrong_configuration_reaches_no_superlink(federation: Federation) -> None:
    done = deploy("run", "--dir", federation.folder, "federation.rounds=0")
    assert done.exit_code == 2
    assert "federation.rounds = 0 is not allowed" in done.output


def test_a_run_without_a_superlink_says_how_to_start_one(federation: Federation) -> None:
    done = deploy("run", "--dir", federation.folder)
    assert done.exit_code == 2
    assert "no SuperLink was started from there" in done.output


def test_what_flower_refuses_is_passed_on(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation.superlink_command(8000)
    program = tmp_path / "flwr"
    program.write_text(
        '#!/bin/sh\necho "Loading"\necho \'{"success": false, "error-message": "no"}\'\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr("layerfed.deploy.federation.program", lambda name: str(program))
    with pytest.raises(DeploymentFailed, match="`flwr supernode list` failed: no"):
        federation.nodes()
    program.write_text('#!/bin/sh\necho "Loading {"\necho \'{"success": true, "nodes": []}\'\n')
    assert federation.online() == 0


@pytest.mark.parametrize("unanswered", [1, 5])
def test_a_busy_superlink_does_not_end_a_run(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unanswered: int
) -> None:
    log = tmp_path / "flwr"
    log.write_text("#!/bin/sh\nexit 0\n")
    log.chmod(0o755)
    monkeypatch.setattr("layerfed.deploy.federation.program", lambda name: str(log))
    monkeypatch.setattr("layerfed.deploy.federation.POLL_SECONDS", 0.0)
    asked = []

    def status(self: Federation, run: int) -> RunStatus:
        asked.append(run)
        if len(asked) <= unanswered:
            raise DeploymentFailed("database is locked")
        return RunStatus("finished:completed", "")

    monkeypatch.setattr(Federation, "status", status)
    if unanswered == 1:
        assert federation.follow(7).completed
    else:
        with pytest.raises(DeploymentFailed, match="database is locked; run 7 may go on"):
            federation.follow(7)


def test_a_folder_of_another_user_is_one_line(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(self: Federation) -> None:
        raise PermissionError(13, "Permission denied", str(self.ca))

    monkeypatch.setattr(Federation, "require_certificates", forbidden)
    done = deploy("gateway", "--dir", federation.folder)
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [f"error: [Errno 13] Permission denied: '{federation.ca}'"]


def test_commands_are_found_outside_of_a_virtual_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin/python3"))
    assert os.access(program("flwr"), os.X_OK)
    with pytest.raises(ConfigError, match="there is no command `no-such`"):
        program("no-such")


@pytest.mark.parametrize("address", ["nonsense", "a:b:c", "https://a:1", "a:"])
def test_an_address_that_is_none_is_refused(federation: Federation, address: str) -> None:
    done = deploy("gateway", "--dir", federation.folder, "--superlink", address)
    assert done.exit_code == 2
    assert f"--superlink {address} is not allowed: it should be HOST:PORT" in done.stderr


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = deploy("certificates", "localhost", "--dir", tmp_path / "file/federation")
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
