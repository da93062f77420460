"""Own tasks of each kind, end to end in this process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from layerfed.config import ConfigError, RunConfig, load_config, run_keys
from layerfed.deploy.federation import known_to_flower
from layerfed.engine import run_on
from layerfed.exchange.scores import TAKEN
from layerfed.report.comparison import RUN_COLUMNS
from layerfed.runs import read_lines
from layerfed.server_app import finite
from layerfed.strategies import option_keys
from layerfed.task import load_task

OWN = "tests.task.own_tasks"
QUICK = [
    *("federation.clients=3", "federation.rounds=2", "train.local-steps=3", "train.batch-size=8"),
    *("strategy.name=top", "task.local-test=0.25"),
]


# Enough training for each of the tiny models to become better.
WELL = ["train.optimizer=adamw", "train.lr=0.02", "train.local-steps=20", "budget.layers=3"]


def run(folder: Path, name: str, *more: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    settings = [f"task.name={OWN}:{name}", f"run.dir={folder}", "run.name=x", *QUICK, *more]
    path = run_on("inprocess", load_config(None, settings))
    return json.loads((path / "summary.json").read_text()), read_lines(path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("name", "main", "scores"),
    [
        ("Sum", "rmse", {"rmse", "mae", "r2", "loss"}),
        ("Signs", "macro_f1", {"macro_f1", "micro_f1", "exact_match", "loss"}),
        ("Tags", "accuracy", {"accuracy", "macro_f1", "balanced_accuracy", "ece", "loss"}),
    ],
)
def test_each_kind_trains_and_states_its_scores(
    name: str, main: str, scores: set[str], tmp_path: Path
) -> None:
    summary, rows = run(tmp_path, name, *WELL)
    assert summary["status"] == "completed"
    assert summary["metric"]["name"] == main
    assert summary["failures"] == 0
    assert all(set(row["scores"]) == scores for row in rows)
    assert rows[-1]["scores"]["loss"] < summary["initial_scores"]["loss"]
    for row in rows:
        assert row["accuracy"] == row["scores"].get("accuracy")
        assert row["loss"] == row["scores"]["loss"]
        for score in scores - {"r2"}:
            assert row[f"client_{score}"] is not None, score
    values = {row["round"]: row["scores"][main] for row in rows}
    best = (max if summary["metric"]["higher_is_better"] else min)(values.values())
    assert summary["best"]["value"] == best == values[summary["best"]["round"]]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "Unsaid",
            r"own_tasks:Unsaid': its kind SingleLabel needs .*outputs of shape \(24, 1\), float",
        ),
        ("UnsaidTags", r"needs .*\(24, 5, 2\).*TokenTagging"),
        (
            "Boasting",
            r"Boasting': score 'accuracy' = 3.9 is outside of its bounds, 0 to 1; Boast.val",
        ),
    ],
)
def test_a_task_that_does_not_say_what_it_scores_is_refused(
    name: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        run(tmp_path, name)


def test_the_main_score_is_chosen_by_name(tmp_path: Path) -> None:
    summary, rows = run(tmp_path, "Sum", "task.metric=r2")
    assert summary["metric"] == {
        "name": "r2",
        "higher_is_better": True,
        "low": None,
        "high": 1.0,
    }
    assert summary["best"]["value"] == max(row["scores"]["r2"] for row in rows)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            ["task.metric=mse"],
            r"'mse' is not a score of .*rmse, mae, r2, loss; did you mean rmse\?",
        ),
        (["task.noise=-1"], r"task.noise = -1 is not allowed: it should be greater than"),
        (
            ["task.nose=1"],
            r"unknown key .task.nose.; .*task.hidden; did you mean task.noise",
        ),
        (["task.options=nose=1"], r"unknown key 'task.nose'"),
        (["task.options=noise='1"], r"task\.options = .*noise='1.* cannot be read: No closing"),
        (["task.noise=1", "task.options=noise=2"], r"task.noise = 1, and task.options says 2"),
    ],
)
def test_settings_are_checked_where_they_enter(settings: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_task(load_config(None, [f"task.name={OWN}:Sum", *settings]))


@pytest.mark.parametrize(("name", "score"), [("Taken", "rounds"), ("Measured", "flops")])
def test_a_score_cannot_be_called_as_the_files_call_something_else(name: str, score: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}': kind cannot call a score '{score}'"):
        load_task(load_config(None, [f"task.name={OWN}:{name}"]))


def test_no_column_of_a_comparison_can_be_a_score() -> None:
    assert set(RUN_COLUMNS) - TAKEN == {"accuracy"}


@pytest.mark.parametrize("given", ["task.noise=0.5", "task.options=noise=0.5"])
def test_settings_of_its_own_reach_the_task(given: str) -> None:
    task = load_task(load_config(None, [f"task.name={OWN}:Sum", given]))
    assert (task.options.noise, task.options.hidden) == (0.5, 6)


def test_a_deployment_hands_settings_over_under_keys_that_flower_knows() -> None:
    config = load_config(None, [f"task.name={OWN}:Sum", "task.noise=0.5", "task.hidden=7"])
    handed = known_to_flower(config)
    assert set(handed) <= {*run_keys(), *option_keys()}
    own = load_task(RunConfig.from_flat(handed)).options
    assert (own.noise, own.hidden) == (0.5, 7)
    again = known_to_flower(RunConfig.from_flat(handed))
    assert again == handed, "a resumed run hands over the same"


def test_a_task_that_ships_has_no_settings_of_its_own() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'task.alfa'.*did you mean task.alpha"):
        load_config(None, ["task.alfa=1"])


def test_a_client_that_would_keep_nothing_to_train_on_is_named() -> None:
    given = [f"task.name={OWN}:Lone", "federation.clients=3"]
    lone = load_task(load_config(None, [*given, "task.local-test=0.2"]))
    with pytest.raises(ConfigError, match=r"partition 2 has 1 examples, .*task\.local-test=0$"):
        lone.client_examples(2)
    assert len(load_task(load_config(None, given)).client_examples(2)[0]) == 1


@pytest.mark.parametrize("name", ["Sides", "Sum", "Signs", "Boasting", "Prices", "Tags"])
def test_the_largest_batch_has_what_the_loss_reads(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load_task(load_config(None, [f"task.name={OWN}:{name}"]))
    monkeypatch.setattr(type(task), "example", lambda self: {"x": torch.zeros(2, 5)})
    largest = task.largest_batch(24)
    assert largest is not None
    [real] = task.partition(0).in_order(24, torch.device("cpu"))
    for column, tensor in largest.items():
        assert (tensor.shape, tensor.dtype) == (real[column].shape, real[column].dtype)
    assert task.loss(task.build_model().to("meta"), largest).shape == ()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Twice", "its groups should be texts of which no two are equal; they are 'odd', 'odd'"),
        ("Numbered", "its classes should be texts of which no two are equal; they are 0, 1"),
        ("ThreeNames", "it names 3 classes, and its model has 2 outputs"),
        ("Untested", "has no test set"),
        ("Unfinished", "lacks the method"),
        ("NoTask", "is no layerfed.task.Task"),
    ],
)
def test_what_would_go_wrong_later_is_one_line(name: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        run(tmp_path, name)


def test_scores_of_its_own_may_be_of_any_number_type_and_undefined(tmp_path: Path) -> None:
    _, rows = run(tmp_path, "Agreeing")
    assert rows[-1]["scores"]["kappa"] == 0.25
    assert "unknown" not in rows[-1]["scores"] or rows[-1]["scores"]["unknown"] is None
    evaluation = json.loads((tmp_path / "x/evaluation.json").read_text())
    assert 0 <= evaluation["calibration"]["ece"] <= 1


def test_a_diverged_run_writes_json() -> None:
    assert finite({"loss": math.inf, "ece": math.nan, "r2": None, "examples": 3}) == {
        "loss": None,
        "ece": None,
        "r2": None,
        "examples": 3,
    }


def test_a_group_in_which_nothing_counts_has_no_scores(tmp_path: Path) -> None:
    _, rows = run(tmp_path, "HalfTagged")
    groups = rows[-1]["groups"]
    assert groups["bare"]["accuracy"] is groups["bare"]["loss"] is None
    assert groups["tagged"]["accuracy"] == rows[-1]["accuracy"]
