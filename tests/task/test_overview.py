"""Who holds how many examples of what, and the scores by group and by client."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from layerfed import server_app
from layerfed.cli import app
from layerfed.config import load_config
from layerfed.engine import run_on
from layerfed.runs import RunFolder, read_lines
from layerfed.task import Task, load_task
from layerfed.task.overview import describe_data

OWN = "tests.task.own_tasks"
SETTINGS = [
    *(f"task.name={OWN}:Sides", "federation.clients=3", "federation.rounds=2", "strategy.name=top"),
    *("train.local-steps=3", "train.batch-size=8"),
]


def task(name: str) -> Task:
    return load_task(load_config(None, [*SETTINGS, f"task.name={OWN}:{name}"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = ["task.local-test=0.25", f"run.dir={tmp_path_factory.mktemp('runs')}"]
    return run_on("inprocess", load_config(None, [*SETTINGS, *more]))


def content(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def test_counts_are_those_of_a_loop_over_examples() -> None:
    own = task("Sides")
    found = describe_data(own, 3)
    assert (found["classes"], found["groups"]) == (["below", "above"], ["odd", "even"])
    for row in [found["test"], *found["clients"]]:
        examples = own.partition(row["partition"]) if "partition" in row else own.test_examples()
        [batch] = examples.in_order(100, torch.device("cpu"))
        labels, groups = batch["label"].tolist(), batch["group"].tolist()
        assert row["classes"] == [labels.count(0), labels.count(1)]
        names = {0: "odd", 1: "even", -1: "other"}
        assert row["groups"] == {n: groups.count(g) for g, n in names.items() if g in groups}


def test_a_group_called_other_keeps_its_examples() -> None:
    own = task("Parts")
    examples = own.test_examples()
    [batch] = examples.in_order(100, torch.device("cpu"))
    groups = batch["group"].tolist()
    assert {name: rows.tolist() for name, rows in own.groups_of(examples).items()} == {
        "odd": [i for i, group in enumerate(groups) if group == 0],
        "other": [i for i, group in enumerate(groups) if group != 0],
    }
    assert set(groups) == {-1, 0, 1}


@pytest.mark.parametrize(("name", "classes"), [("Sum", 0), ("Signs", 5), ("Tags", 2)])
def test_other_kinds_are_counted_by_label_and_token(name: str, classes: int) -> None:
    own = task(name)
    found = describe_data(own, 1)
    assert found["classes"] == [str(i) for i in range(classes)]
    [batch] = own.partition(0).in_order(100, torch.device("cpu"))
    labels = batch["label"].numpy()
    expected = {
        "Sum": [],
        "Signs": labels.sum(0).tolist(),
        "Tags": [int((labels == i).sum()) for i in range(2)],
    }
    assert found["clients"][0]["classes"] == expected[name]


def test_groups_are_scored_by_themselves_and_make_up_the_whole(folder: Path) -> None:
    own = task("Sides")
    model = own.build_model()
    model.load_state_dict(load_file(folder / "final.safetensors"), strict=False)
    [batch] = own.test_examples().in_order(100, torch.device("cpu"))
    hits = (own.logits(model, batch).argmax(1) == batch["label"]).numpy()
    last = read_lines(folder / "metrics.jsonl")[-1]
    assert list(last["groups"]) == ["odd", "even", "other"]
    for number, name in enumerate(("odd", "even", "other")):
        inside = (batch["group"] == (number if number < 2 else -1)).numpy()
        assert last["groups"][name]["examples"] == inside.sum()
        assert last["groups"][name]["accuracy"] == pytest.approx(hits[inside].mean())
    assert last["accuracy"] == last["scores"]["accuracy"] == pytest.approx(hits.mean())
    result = content(folder, "evaluation")
    assert result["groups"] == last["groups"]
    values = [one["accuracy"] for one in last["groups"].values()]
    spread = result["spread"]["groups"]
    assert spread["value"] == last["groups"][spread["worst"]]["accuracy"] == min(values)
    assert spread["range"] == pytest.approx(max(values) - min(values))
    assert spread["std"] == pytest.approx(np.std(values))


def test_the_final_model_is_reported_by_class_and_by_client(folder: Path) -> None:
    result, last = content(folder, "evaluation"), read_lines(folder / "metrics.jsonl")[-1]
    assert (result["round"], result["scores"]) == (2, last["scores"])
    assert np.sum(result["confusion"]) == 24
    assert [row["class"] for row in result["per_class"]] == ["below", "above"]
    clients = result["clients"]
    assert [one["partition"] for one in clients] == [0, 1, 2]
    mean = np.average([c["accuracy"] for c in clients], weights=[c["examples"] for c in clients])
    assert mean == pytest.approx(last["client_accuracy"])
    worst = min(clients, key=lambda one: one["accuracy"])
    assert result["spread"]["clients"]["worst"] == worst["partition"]


def test_a_run_whose_output_is_kept_has_a_client_in_a_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", *SETTINGS, f"run.dir={tmp_path}"])
    assert result.exit_code == 0, result.stderr
    lines = [line.split() for line in result.stderr.splitlines()]
    assert sum(line[:1] == ["client"] and line[2] == "24" for line in lines) == 3


def test_the_data_of_a_run_are_in_its_folder_and_in_flowers_log(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = content(folder, "data")
    assert [c["examples"] for c in data["clients"]] == [18, 18, 18]
    monkeypatch.setattr(server_app, "add_exit_handler", lambda handler: None)
    caplog.set_level("INFO", "flwr")
    server_app._opened(RunFolder(folder, load_config(None, SETTINGS), "superlink", ""))
    lines = [message.split() for message in caplog.messages]
    groups = [f"{group}{n}" for group, n in data["clients"][1]["groups"].items()]
    assert lines[-3] == ["client", "1", "18", *lines[-3][3:]]
    assert "".join(lines[-3][3:-2]).split(",") == groups
    assert list(map(int, lines[-3][-2:])) == data["clients"][1]["classes"]
    assert lines[-1][:3] == ["test", "set", "24"]


def test_clients_of_earlier_rounds_keep_their_latest_evaluation(tmp_path: Path) -> None:
    """Also if the run is resumed, which knows of the rounds before only by their lines."""
    more = ["federation.clients=5", "federation.clients-per-round=2", "federation.rounds=4"]
    settings = [*SETTINGS, *more, "task.local-test=0.25", "run.name=x", f"run.dir={tmp_path}"]
    folder = run_on("inprocess", load_config(None, settings))
    latest = {
        row["client"]: row
        for row in read_lines(folder / "clients.jsonl")
        if row["client_accuracy"] is not None
    }
    found = content(folder, "evaluation")
    assert len(latest) > 2, "more clients than the last round's"
    assert found["clients"] == [
        {
            "partition": client,
            "round": row["round"],
            "examples": 6,
            **{name: row[f"client_{name}"] for name in found["scores"]},
        }
        for client, row in sorted(latest.items())
    ]
    scores = {client: row["client_accuracy"] for client, row in latest.items()}
    assert found["spread"]["clients"]["value"] == min(scores.values())
    shutil.rmtree(folder / "checkpoint/round-000004")
    (folder / "evaluation.json").unlink()
    run_on("inprocess", load_config(folder / "config.json", [f"run.resume={folder}"]))
    assert content(folder, "evaluation") == found


@pytest.mark.parametrize("private", ["privacy.mode=local", "secagg.enabled=true"])
def test_a_private_run_says_nothing_of_single_clients(private: str, tmp_path: Path) -> None:
    more = ["privacy.noise=0.1", "privacy.delta=0.01"] if "privacy" in private else []
    config = load_config(None, [*SETTINGS, private, *more, f"run.dir={tmp_path}"])
    folder = run_on("inprocess", config)
    assert content(folder, "data")["clients"] == []
    assert "clients" not in content(folder, "evaluation")
    assert sum(content(folder, "data")["test"]["classes"]) == 24
