"""Real processes on loopback: SuperLink with TLS and authentication, gateway, and SuperNodes."""

from __future__ import annotations

import json
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import certifi
import httpx
import pytest
from flwr.cli.build import build_fab_from_disk
from safetensors.numpy import load_file

from layerfed.client.workbench import workbench
from layerfed.config import RunConfig, Scalar, load_config
from layerfed.deploy.federation import Federation
from layerfed.deploy.rehearsal import Comparison, Loopback, on_loopback
from layerfed.engine import run_on
from layerfed.runs import read_lines
from tests.e2e.relay import Wire, relay

ROOT = Path(__file__).parents[2]
BUDGETS: list[dict[str, Scalar]] = [{"budget": 1}, {"budget": 3}]
WIRES: list[Wire] = []
CARRIED: list[tuple[dict[str, int], dict[str, float]]] = []
"""In the run of `deployed`, and in as much time without one; both lists by partition id."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def alive(folder: Path) -> list[str]:
    """Command lines of all processes whose environment names a folder: ours, whoever started them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = str(folder).encode() in (process / "environ").read_bytes()
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue  # another user's, or just ended
        if ours and command:
            found.append(command.replace(b"\0", b" ").decode())
    return found


@pytest.fixture(scope="module")
def loopback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    folder = tmp_path_factory.mktemp("deployment")
    nodes = [{"partition-id": i, "num-partitions": 2, **own} for i, own in enumerate(BUDGETS)]
    with on_loopback(folder, []) as running, ExitStack() as stack:
        for number, settings in enumerate(nodes):
            WIRES.append(stack.enter_context(relay(running.gateway)))
            running.start_node(f"node-{number}", settings, door=WIRES[-1].address)
        running.processes.wait(
            "both nodes are connected", lambda: running.federation.online() == 2, 180
        )
        if sys.platform == "linux":
            assert len(alive(folder)) >= 4  # or the test below would pass whatever is left
        yield running
    if sys.platform == "linux":
        assert alive(folder) == []


@pytest.fixture(scope="module")
def deployed(loopback: Loopback) -> Path:
    """The folder of a run on the SuperNodes."""
    config = configured(loopback.folder / "runs", "deployed")
    idle, began = [wire.read() for wire in WIRES], time.monotonic()
    time.sleep(20)
    before, waited = [wire.read() for wire in WIRES], time.monotonic() - began
    began = time.monotonic()
    run = loopback.start_run(ROOT, config)
    status = loopback.federation.follow(run, timeout=600)
    assert status.completed, status
    share = (time.monotonic() - began) / waited
    for wire, first, second in zip(WIRES, idle, before, strict=True):
        after = wire.read()
        CARRIED.append(
            (
                {way: after[way] - second[way] for way in after},
                {way: share * (second[way] - first[way]) for way in after},
            )
        )
    return loopback.folder / "runs/deployed"


def configured(directory: Path, name: str, *more: str) -> RunConfig:
    return load_config(
        None,
        [
            "federation.clients=2",
            "federation.clients-per-round=2",
            "federation.min-replies=2",
            "federation.rounds=2",
            "budget.kind=per-node",
            "strategy.consistency=0.1",  # with λ found a node may train less than it affords
            "run.device=cpu",
            f"run.dir={directory}",
            f"run.name={name}",
            *more,
        ],
    )


def test_a_run_on_real_machines_is_that_of_the_simulation(deployed: Path, tmp_path: Path) -> None:
    simulated = run_on("inprocess", configured(tmp_path, "simulated"), nodes=BUDGETS)
    found = Comparison.of(simulated, deployed)
    assert found.masks
    assert found.weights <= 1e-5
    assert found.accuracies[0] == found.accuracies[1]


def test_each_nodes_process_answers_all_its_messages(loopback: Loopback, deployed: Path) -> None:
    for number in range(2):
        said = (loopback.folder / f"logs/node-{number}.log").read_text()
        assert said.count("the node's process works for run") == 1
        assert "refuses" not in said
        assert "is gone" not in said


def test_each_node_trains_what_it_affords(deployed: Path) -> None:
    rows = read_lines(deployed / "selection.jsonl")
    assert [row["budgets"] for row in rows] == [[1, 3]] * 2
    for row in rows:
        spent = [sum(mask) for mask in row["masks"]]
        assert spent[0] == 1
        assert spent[1] > 1


def test_the_run_folder_is_complete(deployed: Path) -> None:
    names = {file.name for file in deployed.iterdir()}
    assert names >= {
        *("config.json", "summary.json", "metrics.jsonl", "selection.jsonl", "layers.json"),
        *("final.safetensors", "accuracy.png", "layers.png", "report.html"),
    }
    summary = json.loads((deployed / "summary.json").read_text())
    assert (summary["status"], summary["engine"]) == ("completed", "superlink")
    assert summary["accuracy"] > summary["initial_accuracy"]


def test_the_ledger_is_what_the_wire_carried(deployed: Path) -> None:
    """A node's wire carries the tensors, the app once in a run, and framing.

    Framing is the polls and heartbeats of an idle wire in the time of the run, and the requests around
    tensors: Flower sends each tensor as two objects, in a request of its own.
    """
    block = workbench(configured(deployed, "any").to_flat()).resident.layers.blocks[0]
    a_tensor = 3_000 * len(block.tensors) / block.bytes
    bundle = len(build_fab_from_disk(ROOT))
    ledger = read_lines(deployed / "ledger.jsonl")
    for client, (carried, idle) in enumerate(CARRIED):
        for direction, once in (("up", 0), ("down", bundle)):
            counted = sum(row[f"bytes_{direction}"][client] for row in ledger)
            framing = carried[direction] - counted - once
            print(f"client {client} {direction}: {counted} counted, {framing} of framing")
            assert counted > 300_000
            assert 0 <= framing <= a_tensor * counted + 3 * idle[direction] + 150_000
    summary = json.loads((deployed / "summary.json").read_text())
    for direction in ("up", "down"):
        assert summary[f"bytes_moved_{direction}"] == summary[f"bytes_{direction}"]


def test_adapters_and_personal_layers_are_those_of_the_simulation(
    loopback: Loopback, tmp_path: Path
) -> None:
    lora = ("model.tuning=lora", "model.lora-rank=2", "server.aggregation=stack")
    more = (*lora, "model.personal=head", "task.local-test=0.2", "strategy.name=top")
    run = loopback.start_run(ROOT, configured(loopback.folder / "runs", "adapters", *more))
    status = loopback.federation.follow(run, timeout=600)
    assert status.completed, status
    deployed = loopback.folder / "runs/adapters"
    simulated = run_on("inprocess", configured(tmp_path, "simulated", *more), nodes=BUDGETS)
    found = Comparison.of(simulated, deployed)
    assert found.masks
    assert found.weights <= 1e-5
    assert found.accuracies[0] == found.accuracies[1] > 0.1
    tensors = load_file(deployed / "final.safetensors")
    assert any("base_layer" in name for name in tensors)
    assert not any(name.startswith(("head", "norm")) for name in tensors)


def test_who_is_not_registered_or_trusts_another_authority_does_not_get_in(
    loopback: Loopback,
) -> None:
    stranger = Federation(loopback.folder / "stranger-authority")
    stranger.create_certificates([], days=1)
    settings = {"partition-id": 0, "num-partitions": 2}
    refused = {
        "unregistered": loopback.start_node("unregistered", settings, register=False),
        "misled": loopback.start_node(
            "misled", settings, ca=stranger.ca, options=["--max-retries", "1"]
        ),
        "without-ca": loopback.start_node(
            "without-ca", settings, ca=Path(certifi.where()), options=["--max-retries", "1"]
        ),
    }
    said = {}
    for name, process in refused.items():
        assert process.wait(180) != 0, name
        said[name] = (loopback.folder / f"logs/{name}.log").read_text()
    assert "Failed to activate SuperNode" in said["unregistered"]
    assert "CERTIFICATE_VERIFY_FAILED" in said["misled"]
    assert "CERTIFICATE_VERIFY_FAILED" in said["without-ca"]
    assert loopback.federation.online() == 2


def test_the_network_reaches_no_more_than_nodes_need(loopback: Loopback) -> None:
    """Flower's own port lets anyone list and start runs: it stays on loopback."""
    context = ssl.create_default_context(cafile=str(loopback.federation.ca))
    headers = {"content-type": "application/protobuf"}
    with httpx.Client(verify=context, trust_env=False, headers=headers) as client:
        listing = "/v1/control/list-runs"
        assert client.post(f"https://{loopback.superlink}{listing}").status_code == 200
        assert client.post(f"https://{loopback.gateway}{listing}").status_code == 404
        # A node's own call gets through, and fails because it has no signature.
        call = client.post(f"https://{loopback.gateway}/v1/fleet/pull-messages")
        assert call.status_code == 401


def test_no_log_holds_a_secret(loopback: Loopback, deployed: Path) -> None:
    keys = [*loopback.folder.rglob("*.key")]
    assert len(keys) >= 4
    secrets = {
        line
        for key in keys
        for line in key.read_text().splitlines()
        if not line.startswith("-----")
    }
    logs = [*(loopback.folder / "logs").iterdir(), *deployed.glob("*.json*")]
    assert len(logs) >= 6
    for log in logs:
        text = log.read_text(errors="replace")
        assert "PRIVATE KEY" not in text, log
        assert not [secret for secret in secrets if len(secret) > 20 and secret in text], log
