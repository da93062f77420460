"""Checks of the machine, of Flower and of credentials: each wrong thing is found, and nothing hangs."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from uv import find_uv_bin

from layerfed.config import ConfigError
from layerfed.deploy.credentials import create_authority, create_node_key, create_server_certificate
from layerfed.doctor import credentials, flower, machine
from layerfed.doctor.credentials import credential_files
from layerfed.doctor.finding import Finding, examine, size


def wrong(findings: Iterator[Finding]) -> list[Finding]:
    return [each for each in findings if each.status == "wrong"]


def test_a_stuck_or_failing_check_is_a_finding_and_the_others_go_on() -> None:
    stuck = threading.Event()

    def hangs() -> Iterator[Finding]:
        stuck.wait()
        yield Finding("a", "never")

    def fails() -> Iterator[Finding]:
        yield Finding("b", "seen first")
        raise RuntimeError("broken")

    def refused() -> Iterator[Finding]:
        raise ConfigError("set HOME")
        yield

    checks = {"a": hangs, "b": fails, "c": refused, "d": lambda: [Finding("d", "fine")]}
    found = list(examine(checks, 0.2))
    stuck.set()
    assert [(f.check, f.status) for f in found] == [
        ("a", "wrong"),
        ("b", "ok"),
        ("b", "wrong"),
        ("c", "wrong"),
        ("d", "ok"),
    ]
    assert "0.2 s" in found[0].text
    assert "RuntimeError: broken" in found[2].text
    assert found[3].text == "set HOME"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (2.5e9, "2.5 GB"), (7e15, "7e+03 TB")],
)
def test_sizes(number: float, text: str) -> None:
    assert size(number) == text


def test_packages_that_contradict_each_other_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(
        [find_uv_bin(), "venv", "--offline", "--quiet", "--python", sys.executable, tmp_path / "v"],
        check=True,
    )
    python = tmp_path / "v/bin/python"
    place = next((tmp_path / "v/lib").glob("python*/site-packages"))
    for name, more in (("one", "Requires-Dist: two<2\n"), ("two", "")):
        info = place / f"{name}-2.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n{more}")
        (info / "RECORD").write_text("")
        (info / "WHEEL").write_text("Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
    monkeypatch.setattr(sys, "executable", str(python))
    (found,) = machine.packages()
    assert found.status == "wrong"
    assert "`one` requires `two<2`" in found.text
    (place / "one-2.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: one\nVersion: 2.0\n"
    )
    (found,) = machine.packages()
    assert found.status == "ok"


def test_a_folder_that_cannot_be_written_or_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(file / "hub"))
    (found,) = wrong(machine.disks())
    assert str(file) in found.text
    assert "HF_HUB_CACHE" in found.advice
    monkeypatch.setattr(machine, "LITTLE", 1e30)
    assert len(wrong(machine.disks())) == len(machine.places())


def test_flowers_version_is_compared_with_the_declared_range(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not wrong(flower.flower_version())
    monkeypatch.setattr(flower, "version", lambda name: "1.60.0")
    (found,) = flower.flower_version()
    assert found.status == "wrong"
    assert "<1.43" in found.advice


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[superlink", "cannot be read"),
        ('[superlink.lab]\naddress = "x:1"\nroot-certificates = "/no/ca.crt"\n', "/no/ca.crt"),
    ],
)
def test_a_broken_or_stale_home_of_flower(
    text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    assert not wrong(flower.flower_home())
    (tmp_path / "config.toml").write_text(text)
    (found,) = wrong(flower.flower_home())
    assert says in found.text
    assert sorted(tmp_path.iterdir()) == [tmp_path / "config.toml"]


def test_many_apps_of_earlier_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    for number in range(flower.MANY_APPS + 1):
        (tmp_path / f"apps/{number}").mkdir(parents=True)
    (found,) = flower.flower_home()
    assert (found.status, "rm -r" in found.advice) == ("note", True)


def test_reinstalling_dependencies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(flower.VARIABLE, raising=False)
    (found,) = flower.installing()
    assert (found.status, flower.VARIABLE in found.advice) == ("note", True)
    monkeypatch.setenv(flower.VARIABLE, "1")
    (found,) = flower.installing()
    assert found.status == "ok"


def test_a_stray_superlink_of_another_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "flower-superlink"
    script.write_text("import sys\nprint('up', flush=True)\nsys.stdin.read()\n")
    with subprocess.Popen(
        [sys.executable, script, "--simulation", "--port", "39777"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert not [f for f in flower.superlinks() if str(process.pid) in f.text]
        monkeypatch.setenv("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "39777")
        (found,) = [f for f in flower.superlinks() if str(process.pid) in f.text]
        process.communicate()
    assert found.status == "wrong"
    assert str(tmp_path) in found.text
    assert f"kill {process.pid}" in found.advice
    assert not [f for f in flower.superlinks() if str(process.pid) in f.text]


def test_ports_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        there.listen()
        port = there.getsockname()[1]
        monkeypatch.setattr(flower, "PORTS", {port: "me"})
        found = list(flower.ports())
        assert any(f.status == "note" and f"port {port}" in f.text for f in found)
    assert not any(f"port {port}" in f.text for f in flower.ports())


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "federation"
    create_authority(folder / "ca.crt", folder / "ca.key")
    server = folder / "server.crt", folder / "server.key"
    create_server_certificate((folder / "ca.crt", folder / "ca.key"), *server, ["x"], 365)
    create_node_key("a", tmp_path)
    return folder


def test_good_credentials(federation: Path) -> None:
    found = list(credential_files(federation))
    assert {f.status for f in found} == {"ok"}
    assert len(found) == 5
    assert any(f.numbers.get("days_left") == 364 for f in found)


@pytest.mark.parametrize(("days", "status"), [(300, "ok"), (340, "note"), (366, "wrong")])
def test_certificates_expire(
    days: int, status: str, federation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(days=days)  # type: ignore[arg-type]

    monkeypatch.setattr(credentials, "datetime", Later)
    (found,) = [f for f in credential_files(federation) if "server.crt" in f.text]
    assert found.status == status
    assert bool(found.advice) == (status != "ok")


def test_a_key_that_others_can_read(federation: Path) -> None:
    (federation / "server.key").chmod(0o644)
    (found,) = wrong(credential_files(federation))
    assert found.advice == f"chmod 600 {federation / 'server.key'}"


def test_a_certificate_of_another_authority(federation: Path, tmp_path: Path) -> None:
    create_authority(tmp_path / "b/ca.crt", tmp_path / "b/ca.key")
    (tmp_path / "b/ca.crt").replace(federation / "ca.crt")
    (found,) = wrong(credential_files(federation))
    assert "is not signed by" in found.text
    (federation / "server.crt").write_text("nonsense")
    (found,) = wrong(credential_files(federation))
    assert "cannot be read" in found.text
