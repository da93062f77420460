"""The page of a run or of several: its numbers are the files', and no name in them becomes markup."""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from layerfed.cli import app
from layerfed.report import (
    RunFigures,
    comparison_view,
    page,
    plain,
    run_folders,
    run_view,
    sections_of,
    write_page,
)
from layerfed.report.significance import differences_by_seed, holm, paired_test
from layerfed.selection import SelectionProblem, solve
from tests.report.made_folder import EVIL, failed_at_once, make_folder

MOST_BYTES = 2_000_000


def content(html: str) -> dict[str, Any]:
    """Return the data inside a page."""
    found = re.search(r'id="data">([^<]*)<', html)
    assert found is not None
    data: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(found[1])))
    return data


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("runs") / "one")


def test_what_a_page_shows_is_in_the_files(folder: Path) -> None:
    view, metrics = content(page(run_view(folder))), lines(folder, "metrics")
    assert view["scores"]["accuracy"] == [0.1, *(row["accuracy"] for row in metrics)]
    assert view["scores"]["f1"] == [None, *(row["scores"]["f1"] for row in metrics)]
    np.testing.assert_allclose(view["losses"]["test loss"][1:], [r["loss"] for r in metrics], 1e-6)
    sent = np.cumsum([row["bytes_up"] + row["bytes_down"] for row in metrics])
    assert view["spent"]["bytes"] == [0, *sent.tolist()]
    assert view["terms"]["e2_masks"] == [0] * len(metrics)
    assert view["terms_floor"] > max(row["e2"] for row in metrics), "noise would stretch an axis"
    failed = view["clients"][1]
    assert (failed["failures"], failed["reason"]) == (1, f"train: {EVIL}")
    assert failed["bytes_up"] == sum(
        row["bytes_up"] for row in lines(folder, "clients") if row["client"] == 1
    )
    reason = {"phase": "train", "reason": EVIL, "count": 1, "clients": [1], "rounds": [2]}
    assert view["failures"] == [reason]
    assert view["evaluation"] == plain(json.loads((folder / "evaluation.json").read_text()))


def test_what_was_gained_and_what_consistency_cost_follow_from_p1(folder: Path) -> None:
    selections = lines(folder, "selection")
    for row, shown in zip(selections, run_view(folder)["selection"], strict=True):
        gains, masks = np.array(row["statistics"]["grad_norm_sq"]), np.array(row["masks"])
        assert shown["gain"] == pytest.approx((gains * masks).sum())
        assert shown["penalty"] == pytest.approx(0.25), "objective = gain - penalty"
        # A budget of all layers: without the penalty every client takes all with a gain.
        assert shown["best_gain"] == pytest.approx(gains.sum())
        assert shown["spent"] == masks.sum(axis=1).tolist()
        np.testing.assert_allclose(np.square(shown["norms"]), gains, rtol=1e-4)


def test_the_gain_given_up_is_the_difference_to_own_best_layers(tmp_path: Path) -> None:
    gains = np.array([[3.0, 2.0, 0.0, 0.0], [1.0, 4.0, 0.0, 0.0]])
    folder = make_folder(tmp_path / "run", rounds=1, clients=2)
    solved = solve(SelectionProblem(gains, np.ones(4), np.ones(2), 2.0))
    row = lines(folder, "selection")[0] | {
        "budgets": [1.0, 1.0],
        "statistics": {"grad_norm_sq": gains.tolist()},
        "masks": solved.masks.astype(int).tolist(),
        "objective": solved.objective,
    }
    (folder / "selection.jsonl").write_text(json.dumps(row) + "\n")
    shown = run_view(folder)["selection"][0]
    # Both take layer 1 (6); each one's own best are 3 and 4.
    assert (shown["gain"], shown["penalty"], shown["best_gain"]) == (6.0, 0.0, 7.0)


def test_parts_without_a_file_are_left_out(tmp_path: Path) -> None:
    """As in folders of earlier versions, and of a run that has just begun."""
    folder = make_folder(tmp_path / "run")
    for name in ("evaluation.json", "data.json", "clients.jsonl", "metrics.jsonl", "layers.json"):
        (folder / name).unlink()
    (folder / "selection.jsonl").unlink()
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("metric", "best"):
        del summary[key]
    summary |= {"rounds": 0, "status": "running", "accuracy": None, "epsilon": None}
    (folder / "summary.json").write_text(json.dumps(summary))
    view = content(page(run_view(folder)))
    assert view["scores"] == {"accuracy": [0.1]}
    assert (view["clients"], view["selection"], view["evaluation"]) == ([], [], {})
    assert view["sentence"].endswith("The run is not finished.")


def test_a_page_says_why_a_run_failed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(
        json.dumps(summary | {"status": "failed", "error": "RoundFailed: nobody answered"})
    )
    assert "RoundFailed: nobody answered" in run_view(folder)["sentence"]


def test_a_run_without_a_finished_round_has_a_page_of_what_is_known(tmp_path: Path) -> None:
    folder = failed_at_once(tmp_path / "run")
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 0, result.stderr
    assert "RoundFailed: nobody answered" in " ".join(result.stdout.split())
    view = content((folder / "report.html").read_text())
    assert view["sentence"].endswith("The run failed: RoundFailed: nobody answered")
    assert "in 0 of 5 rounds" in view["sentence"]
    assert (view["selection"], view["rounds"]) == ([], [0])
    assert [row["examples"] for row in view["clients"]] == [
        row["examples"] for row in json.loads((folder / "data.json").read_text())["clients"]
    ]
    assert view["settings"]


def test_settings_that_differ_repeat_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "default").write_text("this is no configuration")
    monkeypatch.chdir(tmp_path)
    view = run_view(folder.resolve())
    differ = {key: value for key, value, _, differs in view["settings"] if differs}
    assert differ == {
        "federation.clients": 6,
        "federation.rounds": 5,
        "privacy.mode": "central",
        "privacy.noise": 1.0,
    }
    words = view["commands"]["from its settings"].split()
    assert words[:2] == ["layerfed", "run"]
    assert dict(word.split("=") for word in words[2:]) == {k: str(v) for k, v in differ.items()}


def test_no_name_becomes_markup(folder: Path, tmp_path: Path) -> None:
    view = run_view(folder)
    html = page(view | {"title": EVIL, "sentence": EVIL})
    assert EVIL not in html
    assert "onerror=document" not in html.replace("onerror=document.title=&#x27;owned", "")
    assert html.count("</script>") == 2
    assert content(html)["failures"][0]["reason"] == EVIL
    script = (resources.files("layerfed_assets") / "page/page.js").read_text()
    for sink in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "Function(",
    ):
        assert sink not in script


def test_a_page_of_100_rounds_and_100_clients_is_below_2_megabytes(tmp_path: Path) -> None:
    """Of a model with 24 blocks, whose gradient norms are drawn and do not compress."""
    folder = make_folder(tmp_path / "big", rounds=100, clients=100, layers=24)
    assert write_page(run_view(folder), tmp_path / "big.html").stat().st_size < MOST_BYTES


def test_numbers_fit_json() -> None:
    found = plain({"a": [math.nan, -math.inf, 1 / 3, 2.0], 1: (True, None, "x", 2**60)})
    assert found == {"a": [None, None, 0.3333333, 2], "1": [True, None, "x", 2**60]}
    json.dumps(found, allow_nan=False)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("several")
    for strategy, better in (("ilp", 0.02), ("top", 0.0)):
        for seed in (0, 1):
            make_folder(
                root / f"{strategy}-seed{seed}",
                seed=seed,
                better=better + 0.01 * seed,
                settings=[f"strategy.name={strategy}"],
            )
    return root


def test_a_comparison_has_every_run_under_its_entry(several: Path) -> None:
    sections, left_out = sections_of(run_folders(several))
    view = content(page(comparison_view("several", sections, left_out)))
    (experiment,) = view["experiments"]
    assert [entry["name"] for entry in experiment["entries"]] == ["ilp", "top"]
    for entry in experiment["entries"]:
        for shown in entry["runs"]:
            run = RunFigures.read(several / shown["folder"])
            assert (shown["seed"], shown["score"]) == (run.seed, run.accuracy)
            assert (shown["bytes_up"], shown["seconds"]) == (run.bytes_up, run.seconds)
        scores = [run["score"] for run in entry["runs"]]
        assert entry["curve"][-1][:2] == [5, pytest.approx(np.mean(scores))]
    # Costs are equal, so only the better entry is on the front.
    best = np.mean([run["score"] for run in experiment["entries"][0]["runs"]])
    assert experiment["fronts"]["bytes_up"] == [[pytest.approx(31_900, abs=1100), best]]
    assert ["run.seed", ["0", "1"]] in view["settings"]


def test_a_comparison_has_its_tests_and_what_was_spent_by_each_round(several: Path) -> None:
    (section,) = sections_of(run_folders(several))[0]
    (experiment,) = content(page(comparison_view("several", [section])))["experiments"]
    theirs = differences_by_seed(section.runs["top", None], section.runs["ilp", None])
    shown = experiment["tests"]["ilp"]
    assert shown == plain({"top": asdict(holm([paired_test(theirs)])[0])})
    assert shown["top"]["mean"] == pytest.approx(-2.0), "in points"
    assert experiment["tests"]["top"]["ilp"]["mean"] == pytest.approx(2.0)
    entry = experiment["entries"][0]
    runs = [lines(several / run["folder"], "metrics") for run in entry["runs"]]
    sent = np.mean([[r["bytes_up"] + r["bytes_down"] for r in rows] for rows in runs], axis=0)
    np.testing.assert_allclose(entry["spent"]["bytes"], [0, *np.cumsum(sent)])
    assert len(entry["spent"]["seconds"]) == len(entry["curve"])


def test_entries_are_named_by_what_differs(tmp_path: Path) -> None:
    for n, more in enumerate(("train.lr=0.1", "train.lr=0.2", "server.lr=0.5")):
        make_folder(tmp_path / f"run{n}", settings=[more])
    both, _ = sections_of(run_folders(tmp_path))
    assert "ilp · train.lr = 0.1 · server.lr = 1.0" in both[0].rows
    one, _ = sections_of([tmp_path / "run0", tmp_path / "run1"])
    assert one[0].rows == ["ilp · lr = 0.1", "ilp · lr = 0.2"]


def test_settings_that_one_strategy_alone_has_do_not_make_its_runs_seeds(tmp_path: Path) -> None:
    """Whichever folder comes first, and with a folder that is older than a setting."""
    top = make_folder(tmp_path / "top", settings=["strategy.name=top"])
    low, high = (
        make_folder(tmp_path / f"ilp{n}", settings=[f"strategy.consistency={n}"]) for n in (0.1, 1)
    )
    rows = ["top", "ilp · consistency = 0.1", "ilp · consistency = 1"]
    for folders in ((top, low, high), (low, high, top)):
        (section,) = sections_of(folders)[0]
        assert sorted(section.rows) == sorted(rows)
    fast = make_folder(tmp_path / "fast", settings=["strategy.name=top", "train.head-lr=0.3"])
    older = json.loads((top / "config.json").read_text())
    del older["train.head-lr"]
    (top / "config.json").write_text(json.dumps(older))
    (section,) = sections_of([top, fast])[0]
    assert section.rows == ["top · head-lr = 0.0", "top · head-lr = 0.3"]


def test_each_experiment_has_its_own_score(tmp_path: Path) -> None:
    """The best of errors is the smallest."""
    for n, error in enumerate((1.5, 2.5)):
        folder = make_folder(tmp_path / f"error{n}", settings=["train.lr=0.1"] if n else [])
        summary = json.loads((folder / "summary.json").read_text())
        rmse = {"name": "rmse", "higher_is_better": False, "low": 0.0, "high": None}
        summary |= {"metric": rmse, "scores": {"rmse": error}, "initial_scores": {"rmse": 9.0}}
        (folder / "summary.json").write_text(json.dumps(summary))
        rows = [row | {"scores": {"rmse": error}} for row in lines(folder, "metrics")]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text(text)
    make_folder(tmp_path / "accuracy")
    sections, left_out = sections_of(run_folders(tmp_path))
    assert left_out == []
    shown = content(page(comparison_view("both", sections)))["experiments"]
    assert [each["metric"]["name"] for each in shown] == ["accuracy", "rmse"]
    assert shown[1]["fronts"]["flops"][0][1] == 1.5


def test_seeds_that_ended_early_have_a_curve_to_the_last_common_round(tmp_path: Path) -> None:
    folders = [make_folder(tmp_path / f"seed{n}", rounds=5 - n, seed=n) for n in range(3)]
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"federation.rounds": 5}))
    (section,) = sections_of(folders)[0]
    (experiment,) = comparison_view("early", [section])["experiments"]
    (entry,) = experiment["entries"]
    assert [row[0] for row in entry["curve"]] == [0, 1, 2, 3]
    assert len(entry["spent"]["bytes"]) == 4


def test_a_summary_that_lacks_an_entry_is_one_line(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    del summary["flops"]
    (folder / "summary.json").write_text(json.dumps(summary))
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert (result.exit_code, result.stderr) == (2, "error: a file lacks the entry 'flops'\n")


def test_runs_that_are_not_complete_are_left_out_with_the_reason(
    several: Path, tmp_path: Path
) -> None:
    broken = make_folder(tmp_path / "broken")
    summary = json.loads((broken / "summary.json").read_text())
    (broken / "summary.json").write_text(json.dumps(summary | {"status": "stopped"}))
    _, left_out = sections_of([*run_folders(several), broken])
    assert left_out == [(str(broken), "its status is 'stopped'")]


def test_report_writes_the_page_of_a_run_and_of_several(several: Path, tmp_path: Path) -> None:
    run = str(several / "ilp-seed0")
    cli = CliRunner()
    result = cli.invoke(app, ["report", run])
    assert result.exit_code == 0, result.stderr
    assert content((several / "ilp-seed0/report.html").read_text())["title"] == "ilp-seed0"
    assert f"page        {several / 'ilp-seed0/report.html'}" in result.stdout

    out = tmp_path / "mine.html"
    result = cli.invoke(app, ["report", run, str(several / "top-seed0"), "-o", str(out)])
    assert result.exit_code == 0, result.stderr
    assert content(out.read_text())["kind"] == "comparison"

    result = cli.invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert "is no run folder and no folder of a comparison" in " ".join(result.stderr.split())


def test_runs_of_a_users_own_task_with_other_settings_are_other_entries(tmp_path: Path) -> None:
    for number, settings in enumerate(([], ["task.noise=0.2"])):
        make_folder(tmp_path / f"run{number}", settings=["task.name=a:B", *settings])
    (section,) = sections_of(run_folders(tmp_path))[0]
    assert len(section.runs) == 2
    assert any("noise = –" in row for row, _ in section.runs)
    assert any("noise = 0.2" in row for row, _ in section.runs)
