"""The figures of runs, and names in pictures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from layerfed.exchange.scores import ACCURACY, LOSS
from layerfed.report import run_view
from layerfed.report.comparison import paired_tests
from layerfed.report.comparison_plots import draw_uplink, pareto_front
from layerfed.report.comparison_view import comparison_view, sections_of
from layerfed.report.figures import RunFigures, Section
from layerfed.report.plots import legend_name
from tests.report.made_folder import make_folder


def changed_line(folder: Path, number: int, **fields: object) -> None:
    """Change a round's line of metrics.jsonl."""
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines[number - 1] |= fields
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


def test_a_score_that_is_undefined_at_the_end_is_not_that_of_an_earlier_round(
    tmp_path: Path,
) -> None:
    """A run that diverges would have its score before training."""
    folder = make_folder(tmp_path / "a")
    sound = RunFigures.read(folder)
    assert sound.value == sound.curve[-1][1]
    changed_line(folder, 5, scores={"accuracy": None, "loss": None}, accuracy=None, loss=None)
    found = RunFigures.read(folder)
    assert found.evaluated == 5
    assert math.isnan(found.value)
    assert math.isnan(found.loss)
    changed_line(folder, 5, scores={})
    assert RunFigures.read(folder).value == sound.curve[-2][1]


def test_the_best_is_of_the_rounds_and_not_of_the_pretrained_model(tmp_path: Path) -> None:
    run = RunFigures.read(make_folder(tmp_path / "a"))
    run = replace(run, curves={**run.curves, "accuracy": ((0, 0.99), (1, 0.2), (2, 0.3))})
    assert (run.best_accuracy, run.best_value) == (0.3, 0.3)


def test_the_gains_of_the_page_are_those_of_the_runs_statistic(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", settings=["strategy.statistic=snr"])
    assert all("gain" not in row for row in run_view(folder)["selection"])
    file = folder / "selection.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line["statistics"]["snr"] = [[0.5] * len(mask) for mask in line["masks"]]
        line["objective"] = 0.5 * sum(map(sum, line["masks"]))
        line["held"] = []
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    for row in run_view(folder)["selection"]:
        assert row["gain"] == row["objective"]
        assert row["penalty"] == 0.0


def test_budgets_of_one_kind_are_entries_of_their_own(tmp_path: Path) -> None:
    half = ["budget.kind=half-normal"]
    folders = [
        make_folder(tmp_path / "a", settings=[*half, "budget.min=1", "budget.max=2"]),
        make_folder(tmp_path / "b", settings=[*half, "budget.min=3", "budget.max=4"]),
    ]
    [section], _ = sections_of(folders)
    assert [len(runs) for runs in section.runs.values()] == [1, 1]


def test_time_is_that_of_simulated_clients_where_there_are_some(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    for number in range(1, 6):
        changed_line(folder, number, simulated_seconds=100.0)
    view = comparison_view("x", sections_of([folder])[0])
    [entry] = view["experiments"][0]["entries"]
    assert entry["runs"][0]["seconds"] == entry["spent"]["seconds"][-1] == 500.0


def test_an_undefined_score_takes_no_place(tmp_path: Path) -> None:
    assert ACCURACY.best([math.nan, 0.2, 0.1]) == ACCURACY.best([0.2, 0.1, math.nan]) == 0.2
    assert LOSS.best([math.nan]) is None
    assert pareto_front([(1, math.nan), (2, 0.5), (3, 0.9)]) == [(2, 0.5), (3, 0.9)]


def test_rows_without_budgets_are_compared_once(tmp_path: Path) -> None:
    runs = {
        (row, None): [
            RunFigures.read(make_folder(tmp_path / f"{row}{seed}", seed=seed, better=better))
            for seed in range(3)
        ]
        for row, better in (("full", 0.1), ("head", 0.0))
    }
    section = Section("x", ["full", "head"], ["R = 1", "R = 2"], runs, 3)
    assert list(paired_tests(section, "full")) == [("head", "R = 1")]


def test_names_with_dollars_are_drawn_as_they_are(tmp_path: Path) -> None:
    run = RunFigures.read(make_folder(tmp_path / "a"))
    section = Section("costs $5_^$10", ["up to $1_$2"], [], {("up to $1_$2", None): [run]}, 1)
    assert draw_uplink([section], tmp_path / "picture").stat().st_size
    assert (legend_name("_a"), legend_name("a")) == ("\u200b_a", "a")
