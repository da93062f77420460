"""The same job on Flower's own engines: the Ray simulation, and `flwr run` with its SuperLink."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from layerfed.config import load_config
from layerfed.engine import run_on
from layerfed.runs import read_lines

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
SETTINGS = {
    "federation.rounds": "3",
    "federation.clients-per-round": "6",
    "strategy.probe-batches": "1",
    "budget.kind": "half-normal",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def left_behind(session: int, patience: float = 10.0) -> list[str]:
    """Command lines of a session's processes that still live after a short while."""
    deadline = time.monotonic() + patience
    while True:
        found = subprocess.run(
            ["ps", "-o", "stat=,args=", "-s", str(session)],
            capture_output=True,
            text=True,
            check=False,
        )
        living = [line for line in found.stdout.splitlines() if not line.startswith("Z")]
        if not living or time.monotonic() > deadline:
            return living
        time.sleep(0.2)


def test_ray_simulation_gives_the_same_run_as_the_inprocess_engine(tmp_path: Path) -> None:
    overrides = [f"{key}={value}" for key, value in SETTINGS.items()]
    command = [BIN / "layerfed", "run", *overrides, "run.name=ray", "--engine", "ray"]
    process = subprocess.Popen(
        [*command, "--dir", tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert str(tmp_path / "ray/layers.png") in out
    assert left_behind(process.pid) == []

    config = load_config(None, [*overrides, f"run.dir={tmp_path}", "run.name=inprocess"])
    run_on("inprocess", config)

    folders = [tmp_path / "ray", tmp_path / "inprocess"]
    summaries = [json.loads((f / "summary.json").read_text()) for f in folders]
    assert [s["engine"] for s in summaries] == ["ray", "inprocess"]
    assert summaries[0]["accuracy"] > summaries[0]["initial_accuracy"] + 0.3
    masks = [[r["masks"] for r in read_lines(f / "selection.jsonl")] for f in folders]
    assert masks[0] == masks[1]
    ray, inprocess = (load_file(f / "final.safetensors") for f in folders)
    for name in inprocess:
        np.testing.assert_allclose(ray[name], inprocess[name], rtol=0, atol=1e-6, err_msg=name)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


Flwr = Callable[..., str]


@pytest.fixture
def flwr(tmp_path: Path) -> Iterator[Flwr]:
    """`flwr` in a folder, a home and with ports of the test; it returns what the command says."""
    home = tmp_path / "flwr"
    home.mkdir()
    environment = {
        **os.environ,
        **QUIET,
        # `flwr` finds its SuperLink on the path, which an environment need not be activated to use.
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "PYTHONPATH": str(tmp_path),
    }

    def run(*words: str | Path) -> str:
        # Flower gives its SuperLink 15 s to start, and a fraction of one to say that it is there.
        for _ in range(5):
            done = subprocess.run(
                [BIN / "flwr", *words],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=300,
                check=False,
                cwd=tmp_path,
            )
            if "Failed to start local SuperLink" not in done.stdout:
                break
        return done.stdout

    yield run
    stop_superlink(str(home))


def stop_superlink(home: str) -> None:
    """Stop the SuperLink that `flwr run` started for this home, and no other."""
    pattern = f"{home}/local-superlink"
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=False)
    for pid in (int(word) for word in found.stdout.split()):
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            if not Path(f"/proc/{pid}").exists():
                break
            time.sleep(0.1)


def statuses(flwr: Flwr) -> dict[str, str]:
    """The runs of the SuperLink: {status: one run's details}."""
    listed = flwr("list", "--format", "json")
    return {run["status"]: run["status-details"] for run in json.loads(listed)["runs"]}


def in_one_line(output: str, says: str) -> None:
    """Check that a run ended with one line for the user."""
    assert says in output
    assert len([line for line in output.splitlines() if "error: " in line]) == 1
    assert "Traceback" not in output


def test_flwr_run_works_from_the_app_bundle(tmp_path: Path, flwr: Flwr) -> None:
    run_config = tmp_path / "run.toml"
    run_config.write_text(
        "".join(
            f"{key} = {value if value.isdigit() else json.dumps(value)}\n"
            for key, value in {
                **SETTINGS,
                "run.dir": str(tmp_path / "runs"),
                "run.name": "x",
            }.items()
        )
    )
    federation = "num-supernodes=10 client-resources-num-cpus=1"
    command = ["run", ROOT, "--stream", "--federation-config", federation, "--run-config"]
    output = flwr(*command, run_config)
    misfit = flwr(*command, "federation.clients=11")
    runs = statuses(flwr)

    summary = json.loads((tmp_path / "runs/x/summary.json").read_text())
    assert summary["status"] == "completed", output
    assert summary["accuracy"] > summary["initial_accuracy"] + 0.3
    assert "[round 3/3] accuracy" in output
    # Flower's own exit status does not tell; its list does, with our one line.
    in_one_line(misfit, "federation.clients = 11, but the federation has 10 SuperNodes")
    assert set(runs) == {"finished:completed", "finished:failed"}
    assert "11" in runs["finished:failed"]


def test_a_bare_flwr_run_takes_the_federation_as_it_is_and_a_strategy_of_ones_own_and_can_be_stopped(
    tmp_path: Path, flwr: Flwr
) -> None:
    """Flower gives an app two SuperNodes; the run folder is in the current folder.

    The strategy's module is on the path of the SuperLink, and not in the app.
    """
    shutil.copy(ROOT / "tests/strategies/own_strategy.py", tmp_path / "my_strategy.py")
    own = "strategy.name='my_strategy:Middle' strategy.options='shift=1'"

    def wait(ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 200
        while not ready():
            assert time.monotonic() < deadline
            time.sleep(0.5)

    started = flwr("run", ROOT, "--run-config", f"federation.rounds=300 run.name='x' {own}")
    found = re.search(r"started run (\d+)", started)
    assert found is not None, started
    folder = tmp_path / "runs/x"
    wait((folder / "metrics.jsonl").exists)
    written = json.loads((folder / "config.json").read_text())
    assert written["federation.clients"] == 2
    assert (written["strategy.name"], written["strategy.shift"]) == ("my_strategy:Middle", 1)
    blocks = len(json.loads((folder / "layers.json").read_text())["layers"]) - 2
    mask = [int(block == blocks // 2 + 1) for block in range(blocks)]
    assert read_lines(folder / "selection.jsonl")[0]["masks"] == [mask] * 2
    flwr("stop", found.group(1))
    summary = folder / "summary.json"
    wait(lambda: json.loads(summary.read_text())["status"] == "stopped")
    # The process works on for some seconds, and the folder says nothing of it.
    rounds = len(read_lines(folder / "metrics.jsonl"))
    time.sleep(10)
    assert len(read_lines(folder / "metrics.jsonl")) == rounds
    assert json.loads(summary.read_text())["rounds"] == rounds
