"""The wheel in an environment of its own, as a user has it: the command, and Flower's app."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from uv import find_uv_bin

from scripts.dist import ROOT, build, tracked
from scripts.generate import BASELINE
from tests.e2e.test_flower import QUIET, free_port, stop_superlink

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

VERSION = f"{sys.version_info.major}{sys.version_info.minor}"


@dataclass(frozen=True)
class Installed:
    """A folder with the distributions, and an environment with the wheel."""

    folder: Path

    def call(self, *words: str | Path, **variables: str) -> str:
        """Run a command of the environment, outside of the clone."""
        beside = self.folder / "env/bin"
        done = subprocess.run(
            [beside / words[0], *words[1:]],
            env={
                **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
                **QUIET,
                **variables,
                "PATH": f"{beside}{os.pathsep}{os.environ['PATH']}",
            },
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("package")
    build("https://example.org/owner/layerfed", folder / "dist")
    (wheel,) = (folder / "dist").glob("*.whl")
    uv, python = find_uv_bin(), folder / "env/bin/python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder / "env"], check=True)
    tested = ROOT / f"requirements/py{VERSION}.txt"
    constraint = ["--constraint", tested] if tested.exists() else []
    install = [uv, "pip", "install", "--quiet", "--python", python, *constraint]
    subprocess.run([*install, f"{wheel}[simulation]"], check=True)
    return Installed(folder)


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[dict[str, str]]:
    yield {
        "FLWR_HOME": str(tmp_path),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
    }
    stop_superlink(str(tmp_path))


def test_pypi_can_show_both_distributions(installed: Installed) -> None:
    files = sorted((installed.folder / "dist").glob("layerfed-*"))
    assert len(files) == 2
    subprocess.run([find_uv_bin(), "tool", "run", "twine", "check", "--strict", *files], check=True)


def test_the_source_distribution_is_complete(installed: Installed) -> None:
    (file,) = (installed.folder / "dist").glob("*.tar.gz")
    with tarfile.open(file) as packed:
        inside = {name.partition("/")[2] for name in packed.getnames()}
    # What only the repository's own services read stays there.
    wanted = {name for name in tracked() if not name.startswith(".")}
    assert wanted - inside == set()


def test_the_command_works_outside_of_a_clone(installed: Installed) -> None:
    quick = ["federation.rounds=1", "federation.clients=2", "train.local-steps=1"]
    out = installed.call("layerfed", "run", "default", *quick, "run.name=x")
    summary = json.loads((installed.folder / "runs/x/summary.json").read_text())
    assert summary["status"] == "completed", out
    assert (installed.folder / "runs/x/report.html").exists()
    (found,) = [
        each
        for each in json.loads(installed.call("layerfed", "doctor", "--json"))["findings"]
        if each["check"] == "packages"
    ]
    assert found["status"] == "ok", found["text"]


def test_flwr_run_of_the_baseline_with_the_installed_package(
    installed: Installed, superlink: dict[str, str]
) -> None:
    settings = {
        "federation.rounds": "1",
        "train.local-steps": "1",
        "run.dir": f"'{installed.folder / 'runs'}'",
        "run.name": "'baseline'",
    }
    out = installed.call(
        *("flwr", "run", BASELINE, "--stream"),
        *("--federation-config", "num-supernodes=2 client-resources-num-cpus=1"),
        *("--run-config", " ".join(f"{key}={value}" for key, value in settings.items())),
        **superlink,
    )
    summary = json.loads((installed.folder / "runs/baseline/summary.json").read_text())
    assert summary["status"] == "completed", out
