"""What a configuration takes: as the run measures it, in a process that changes nothing and ends."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from layerfed.cli import app
from layerfed.config import load_config
from layerfed.doctor import findings
from layerfed.doctor.finding import Finding
from layerfed.doctor.job import look, tried
from layerfed.engine import run_on
from layerfed.runs import read_lines

SMALL = ["train.batch-size=4", "federation.clients=3", "strategy.name=top", "run.device=cpu"]


def here(*settings: str) -> dict[str, Finding]:
    return {each.check: each for each in look(load_config(None, [*SMALL, *settings]))}


def apart(*settings: str, seconds: float = 200.0) -> dict[str, Finding]:
    return {each.check: each for each in tried(load_config(None, [*SMALL, *settings]), seconds)}


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_data_model_and_bytes_are_those_of_the_run(codec: str, tmp_path: Path) -> None:
    settings = [f"exchange.codec={codec}", "budget.layers=2", f"run.dir={tmp_path}"]
    seen = here(*settings)
    assert [each for each in seen.values() if each.status != "ok"] == []
    assert not list(tmp_path.iterdir())
    config = load_config(None, [*SMALL, *settings, "federation.rounds=1", "train.local-steps=1"])
    folder = run_on("inprocess", config)
    clients = json.loads((folder / "data.json").read_text())["clients"]
    assert list(seen["data"].numbers["clients"]) == [client["examples"] for client in clients]
    # Blocks of the shipped ViT are of one size, and without a probe only updates go up.
    sent = set(read_lines(folder / "ledger.jsonl")[0]["bytes_up"])
    assert sent == {seen["bytes"].numbers["uplink_client"]}
    needed = seen["memory"].numbers
    assert needed["client_bytes"] > needed["peak_bytes_by_mask"]["top"]
    assert seen["time"].numbers["step_seconds"] > 0


@pytest.mark.parametrize(
    ("settings", "check", "says"),
    [
        (["task.name=custom", "task.data=/no/such"], "data", "'/no/such' does not exist"),
        (["budget.layers=13"], "model", "budget.layers = 13 is above the whole model"),
    ],
)
def test_what_a_run_would_refuse_is_wrong(settings: list[str], check: str, says: str) -> None:
    seen = here(*settings)
    assert seen[check].status == "wrong"
    assert says in seen[check].text


def test_a_task_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_task.py").write_text(
        "import os, pathlib, time\n"
        "pathlib.Path(__file__).with_name('pid').write_text(str(os.getpid()))\n"
        "time.sleep(1000)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    began = time.monotonic()
    (only,) = apart("task.name=slow_task:Mine", seconds=1.0).values()
    assert only.status == "wrong"
    assert "--seconds" in only.advice
    assert time.monotonic() - began < 100


def test_caches_are_read_and_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    images = tmp_path / "images"
    for name in "ab":
        (images / name).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(images / name / f"{number}.png")
    before = sorted(tmp_path.rglob("*"))
    seen = apart("task.name=custom", f"task.data={images}", "task.partition=iid")
    assert [each for each in seen.values() if each.status != "ok"] == []
    assert sum(seen["data"].numbers["clients"]) + seen["data"].numbers["test"] == 40
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_prints_json_alone_and_fails_if_something_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("layerfed.doctor.examine", lambda checks, seconds: [Finding("a", "fine")])
    cli = CliRunner()
    result = cli.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "wrong": 0,
        "findings": [{"check": "a", "text": "fine", "advice": "", "status": "ok", "numbers": {}}],
    }
    bad = [Finding("a", "broken [b]", "mend it", "wrong"), Finding("b", "known", "", "note")]
    monkeypatch.setattr("layerfed.doctor.examine", lambda checks, seconds: bad)
    result = cli.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "broken [b]" in result.stdout
    assert "→ mend it" in result.stdout
    assert cli.invoke(app, ["doctor", "--json", "train.lr=x"]).exit_code == 2


def test_every_finding_that_is_not_fine_says_what_to_do(tmp_path: Path) -> None:
    seen = list(findings(None, tmp_path, 1.0))
    assert {"python", "packages", "torch", "gpu", "disk", "flower", "ports"} <= {
        each.check for each in seen
    }
    assert all(each.advice for each in seen if each.status != "ok")
