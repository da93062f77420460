"""Tables and pictures of a comparison, from the lines of run folders."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from layerfed.config import RunConfig
from layerfed.exchange.scores import ACCURACY, Score
from layerfed.report import RunFigures, Section, draw_accuracy, draw_terms, draw_uplink
from layerfed.report.comparison import (
    accuracy_table,
    differences,
    differences_csv,
    measured_costs,
    paired_differences,
    paper_accounting,
    runs_csv,
    scores_table,
    significance_table,
)
from layerfed.report.comparison_plots import look, mean_curve, pareto_front
from layerfed.report.paper_costs import paper_costs
from layerfed.report.plots import fit
from tests.compare.synthetic import write_run


def figures(
    path: Path, *accuracies: float, config: RunConfig | None = None, **line: object
) -> RunFigures:
    folder = path / f"run-{len(list(path.iterdir()))}"
    write_run(folder, config or RunConfig(), accuracies, **line)
    return RunFigures.read(folder)


@pytest.fixture
def section(tmp_path: Path) -> Section:
    return Section(
        title="Digits",
        rows=["full", "top", "both", "ours"],
        budgets=["R = 1", "R = 2"],
        runs={
            ("full", None): [figures(tmp_path, 0.99, bytes_up=9000, bytes_down=9000, flops=8e12)],
            ("top", "R = 1"): [figures(tmp_path, 0.5), figures(tmp_path, 0.6)],
            ("top", "R = 2"): [figures(tmp_path, 0.7), figures(tmp_path, 0.7)],
            ("both", "R = 2"): [],
            ("ours", "R = 1"): [figures(tmp_path, 0.8, flops_probe=4e12)],
            ("ours", "R = 2"): [figures(tmp_path, 0.7), figures(tmp_path, 0.7)],
        },
        seeds=2,
        paper={"full": [95.43], "top": [93.09, 93.61], "both": [float("nan"), 94.96]},
        paper_costs={"full": {"tflops": 8.47, "mbit-up": 2811}},
    )


def test_accuracies_are_means_and_deviations_and_the_best_is_bold(section: Section) -> None:
    assert accuracy_table(section).markdown().splitlines() == [
        "| strategy | R = 1 | R = 2 | paper, R = 1 | paper, R = 2 | uplink % | downlink % | TFLOPs |",
        "|---|---|---|---|---|---|---|---|",
        "| full | 99.00 (1 of 2) | 99.00 (1 of 2) | 95.43 | 95.43 | 100.0 | 100.0 | 10.00 |",
        "| top | 55.00 ± 7.07 | **70.00 ± 0.00** | 93.09 | 93.61 | 24.4 | 12.2 | 6.00 |",
        "| both | – | … | – | 94.96 | … | … | … |",
        "| ours | **80.00 (1 of 2)** | **70.00 ± 0.00** | – | – | 24.4 | 12.2 | 8.00 |",
    ]


def test_of_an_error_the_smallest_is_bold_and_nothing_is_in_percent(tmp_path: Path) -> None:
    def run(error: float) -> RunFigures:
        metric = Score("rmse", higher_is_better=False, high=math.inf)
        curves = {"rmse": ((0, 9.0), (1, error)), "loss": ((1, error**2),)}
        return replace(figures(tmp_path, 0.5), metric=metric, curves=curves)

    runs = {("a", "R = 1"): [run(1.5), run(2.5)], ("b", "R = 1"): [run(30.0), run(31.0)]}
    shown = Section("x", ["a", "b"], ["R = 1"], runs, 2)
    rows = [line.split(" | ")[1] for line in accuracy_table(shown).markdown().splitlines()[2:]]
    assert rows == ["**2 ± 0.7071**", "30.5 ± 0.7071"]
    assert scores_table(shown).markdown().splitlines() == [
        "| strategy | RMSE | loss |",
        "|---|---|---|",
        "| a | 2.0000 ± 0.7071 | 4.2500 ± 2.8284 |",
        "| b | 30.5000 ± 0.7071 | 930.5000 ± 43.1335 |",
    ]
    row = next(csv.DictReader(runs_csv([("x", shown)]).splitlines()))
    assert (row["metric"], row["value"], row["best_value"]) == ("rmse", "1.5", "1.5")
    assert (row["rmse"], row["loss"], row["accuracy"]) == ("1.5", "2.25", "nan")
    assert pareto_front([(1, 3.0), (2, 4.0), (3, 2.0)], shown.metric) == [(1, 3.0), (3, 2.0)]


def test_a_score_that_is_undefined_in_one_seed_is_left_out_of_its_mean(tmp_path: Path) -> None:
    def run(value: float) -> RunFigures:
        return replace(figures(tmp_path, 0.5), curves={"accuracy": ((0, 0.1), (1, value))})

    nan, loss = math.nan, {"loss": ((1, math.nan),), "f1": ((1, 0.5),)}
    runs = {
        ("a", "R = 1"): [run(nan), run(0.25), run(0.75)],
        ("b", "R = 1"): [run(nan), run(nan)],
        ("c", "R = 1"): [replace(run(0.25), curves={**run(0.25).curves, **loss}), run(0.25)],
    }
    shown = Section("x", ["a", "b", "c"], ["R = 1"], runs, 3)
    rows = [line.split(" | ")[1] for line in accuracy_table(shown).markdown().splitlines()[2:]]
    assert rows == ["50.00 ± 35.36 (2 of 3)", "– (0 of 3)", "**25.00 ± 0.00 (2 of 3)**"]
    assert scores_table(shown).markdown().splitlines()[-1] == "| c | 0.2500 ± 0.0000 | – | 0.5000 |"


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """Both rows swing by ten points from seed to seed, and one is a point ahead in each."""

    def runs(*scores: float) -> list[RunFigures]:
        configs = [RunConfig.from_flat({"run.seed": seed}) for seed in range(len(scores))]
        return [figures(tmp_path, x, config=c) for x, c in zip(scores, configs, strict=True)]

    section = Section(
        title="x",
        rows=["full", "top", "both", "ours"],
        budgets=["R = 1", "R = 2"],
        runs={
            ("full", None): runs(0.9, 0.8),
            ("top", "R = 1"): list(reversed(runs(0.51, 0.61, 0.99))),
            ("top", "R = 2"): [],
            ("both", "R = 2"): runs(0.4),
            ("ours", "R = 1"): runs(0.5, 0.6),
            ("ours", "R = 2"): runs(0.7),
        },
        seeds=3,
    )
    assert paired_differences(section, "ours").markdown().splitlines() == [
        "| less ours | R = 1 | R = 2 |",
        "|---|---|---|",
        "| full | +30.00 ± 14.14 | +20.00 |",
        "| top | +1.00 ± 0.00 | … |",
        "| both | – | -30.00 |",
    ]
    single = Section("x", ["top", "ours"], ["R = 2"], section.runs, 1)
    assert not paired_differences(single, "ours")


def test_costs_are_of_a_client_and_round(section: Section) -> None:
    lines = measured_costs(section, "full").markdown().splitlines()
    assert lines[2] == (
        "| full | 4 | 1 | 100.0 (20.0) | 0.036 | 100.0 | 0.036 | 100.0 | 4 | 0.5 | 5 (7) "
        "| 99.00 (1 of 2) |"
    )
    assert lines[5] == (
        "| ours | 2 | 2 | 80.0 (40.0) | 0.0088 | 24.4 | 0.0044 | 12.2 | 4 | 0.5 | 5 (7) "
        "| 80.00 (1 of 2) |"
    )
    assert lines[4].count("…") == 9
    assert "– (–)" in measured_costs(section).markdown()


def test_a_run_that_sent_nothing_down_has_no_ratio(tmp_path: Path, section: Section) -> None:
    silent = figures(tmp_path, 0.5, bytes_down=0)
    runs = {**section.runs, ("full", None): [silent]}
    nothing = Section(section.title, section.rows, section.budgets, runs, 2)
    assert "| 0 | – |" in measured_costs(nothing, "full").markdown().splitlines()[2]


def test_the_papers_accounting_stands_beside_its_figures(section: Section) -> None:
    # Block 0 of four equal ones: a quarter of 3 × 180 FLOPs × 5 steps × 32 examples, of 4,500 bytes.
    ours = section.first("ours")[0].accounted
    assert ours.flops == 3 * 180 * 5 * 32 / 4
    assert ours.bytes_up == 4500 / 4
    lines = paper_accounting(section, "full").markdown().splitlines()
    assert lines[0].count("paper: ") == 6
    assert lines[2].endswith("| 8.47 | – | – | – | 2,811 | – |")
    assert lines[5].endswith("| – | – | – | – | – | – |")


def test_epochs_have_no_nominal_number_of_examples(tmp_path: Path) -> None:
    config = RunConfig.from_flat({"train.local-steps": 0, "train.local-epochs": 1})
    run = figures(tmp_path, 0.5, config=config)
    assert run.accounted.flops is None
    alone = Section("x", ["top"], ["R = 1"], {("top", "R = 1"): [run]}, 1)
    assert (
        paper_accounting(alone)
        .markdown()
        .splitlines()[2]
        .startswith("| top | – | – | 1 | – | 0.009 |")
    )


def test_the_papers_rule_gives_its_printed_figures() -> None:
    """CLIP ViT-B/32's image tower, R = 1 [S, Table 3]; FLOPs as counted by `forward_flops`."""
    clip = {
        "layer_flops": np.full(12, 0.7154688e9),
        "model_flops": 8.81762304e9,
        "layer_bytes": np.full(12, 4 * 7_087_872),
        "model_bytes": 4 * 87_849_216,
        "examples": 5 * 64,
    }
    full = paper_costs(np.ones((20, 12), dtype=bool), **clip)
    one = paper_costs(np.eye(12, dtype=bool), **clip)
    assert full.flops == pytest.approx(8.47e12, rel=1e-3)
    assert full.bytes_up * 8e-6 == pytest.approx(2811, rel=1e-3)
    assert one.bytes_up * 8e-6 == pytest.approx(234, rel=2e-3)
    # 0.73, 0.71 and 0.69 in the three rows that train one layer.
    assert one.flops == pytest.approx(0.71e12, rel=1e-2)


def test_every_run_is_a_line_of_the_csv(section: Section) -> None:
    rows = list(csv.DictReader(runs_csv([("digits", section)]).splitlines()))
    assert len(rows) == 8
    assert {row["experiment"] for row in rows} == {"digits"}
    assert rows[0]["budget"] == ""
    assert float(rows[0]["flops"]) == 8e12


def test_a_step_takes_what_clients_say_whatever_the_phase_took(tmp_path: Path) -> None:
    """Ten steps in 6 s of the clients' own; messages, averages and a full core are not theirs."""
    run = figures(tmp_path, 0.5, steps=10, train_seconds=6.0, seconds_by_phase={"train": 99.0})
    silent = figures(tmp_path, 0.5, steps=0, train_seconds=0.0, peak_memory=0.0)
    shown = Section(
        "x", ["a", "b"], ["R = 1"], {("a", "R = 1"): [run], ("b", "R = 1"): [silent]}, 1
    )
    lines = [line.split(" | ") for line in measured_costs(shown).markdown().splitlines()]
    column = lines[0].index("s a step")
    assert [lines[2][column], lines[3][column]] == ["0.6", "–"]
    assert [lines[2][column + 1], lines[3][column + 1]] == ["5 (7)", "– (7)"]


def test_the_loss_is_that_of_the_last_evaluation(tmp_path: Path) -> None:
    assert figures(tmp_path, 0.5, 0.6, loss=1.5).loss == 1.5
    assert math.isnan(figures(tmp_path, 0.5).loss)


def test_the_terms_of_the_theory_are_means_over_the_rounds_that_have_them(tmp_path: Path) -> None:
    run = figures(tmp_path, 0.5, 0.6, e1=None, e2=0.5)
    assert math.isnan(run.e1)
    assert (run.e2, run.e2_masks) == (0.5, 0.0)
    assert run.terms["e2"] == ((1, 0.5), (2, 0.5))


def test_runs_of_another_make_are_pointed_out(tmp_path: Path, section: Section) -> None:
    """They count as done, and their costs would otherwise be averaged without notice."""
    assert differences([section]) == ""
    ray, newer = tmp_path / "ray", tmp_path / "newer"
    write_run(ray, RunConfig(), engine="ray")
    write_run(newer, RunConfig(), torch="2.15.0")
    runs = {("top", "R = 1"): [RunFigures.read(ray), RunFigures.read(newer)]}
    said = differences([Section("x", ["top"], ["R = 1"], runs, 2)])
    assert "differ in engine (inprocess, ray) and torch (2.14.1, 2.15.0)" in said


def test_runs_of_other_data_are_pointed_out(tmp_path: Path) -> None:
    for name, data in (("one", "a"), ("other", "b"), ("unknown", "")):
        write_run(tmp_path / name, RunConfig())
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        (tmp_path / name / "summary.json").write_text(json.dumps(summary | {"data": data}))
    one, other, unknown = (RunFigures.read(tmp_path / n) for n in ("one", "other", "unknown"))

    def said(*runs: RunFigures) -> str:
        entries = {(f"row {i}", "R = 1"): [run] for i, run in enumerate(runs)}
        return differences([Section("x", ["top"], ["R = 1"], entries, 1)])

    assert f"not of the same data** (x, seed {one.seed})" in said(one, other)
    assert said(one, unknown) == said(one, replace(other, seed=9)) == ""


def test_a_run_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Its missing figures stay unknown, and it need not run again."""
    figures(tmp_path, 0.5)
    file = tmp_path / "run-0/metrics.jsonl"
    line = json.loads(file.read_text())
    for key in ("steps", "train_seconds", "peak_memory_probe", "e1", "e2", "e2_masks"):
        del line[key]
    file.write_text(json.dumps(line) + "\n")
    run = RunFigures.read(tmp_path / "run-0")
    assert (run.accuracy, run.metrics["steps"], run.metrics["peak_memory_probe"]) == (0.5, 0, 0.0)
    assert math.isnan(run.e2)


def test_a_run_that_lost_lines_is_not_taken_for_a_shorter_one(tmp_path: Path) -> None:
    figures(tmp_path, 0.3, 0.9, 0.6)
    file = tmp_path / "run-0/metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl has 2 whole lines for 3 rounds"):
        RunFigures.read(tmp_path / "run-0")
    file.write_text(lines[0] + "{\n" + lines[2])
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged"):
        RunFigures.read(tmp_path / "run-0")


def test_no_two_of_many_rows_look_alike() -> None:
    looks = [look(number) for number in range(40)]
    assert len({(color, line) for color, line, _ in looks}) == 40
    assert len({(color, filling) for color, _, filling in looks}) == 40


def test_figures_are_sums_over_lines_not_the_summarys(tmp_path: Path) -> None:
    run = figures(tmp_path, 0.3, 0.9, 0.6)
    assert (run.rounds, run.updates, run.bytes_up, run.metrics["flops"]) == (3, 6, 6600, 12e12)
    assert run.curve == ((0, 0.1), (1, 0.3), (2, 0.9), (3, 0.6))
    assert (run.accuracy, run.best_accuracy) == (0.6, 0.9)


def test_a_curve_has_the_rounds_that_all_runs_were_evaluated_in(tmp_path: Path) -> None:
    rounds, mean, spread = mean_curve(
        [figures(tmp_path, 0.2, 0.4).curve, figures(tmp_path, 0.4).curve]
    )
    assert rounds.tolist() == [0, 1]
    np.testing.assert_allclose(mean, [0.1, 0.3])
    np.testing.assert_allclose(spread, [0.0, np.std([0.2, 0.4], ddof=1)])
    assert mean_curve([figures(tmp_path, 0.2).curve])[2].tolist() == [0.0, 0.0]


def test_pictures_are_drawn_of_what_there_is(section: Section, tmp_path: Path) -> None:
    for draw in (draw_accuracy, draw_terms, draw_uplink):
        drawn = draw([section, section], tmp_path / "picture.png")
        assert drawn.read_bytes().startswith(b"\x89PNG")
        drawn.unlink()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_nothing_is_cheaper_and_better_than_the_front(points: list[tuple[int, int]]) -> None:
    front = pareto_front([(float(cost), float(score)) for cost, score in points])
    assert set(front) <= set(points)
    assert front == sorted(set(front))
    for cost, score in points:
        assert any(c <= cost and s >= score for c, s in front)
        for c, s in front:
            assert not (cost <= c and score >= s and (cost, score) != (c, s))


def test_paired_tests_are_in_table_and_csv(tmp_path: Path) -> None:
    def runs(*scores: float) -> list[RunFigures]:
        configs = [RunConfig.from_flat({"run.seed": seed}) for seed in range(len(scores))]
        return [figures(tmp_path, x, config=c) for x, c in zip(scores, configs, strict=True)]

    ours, top, low = (0.50, 0.60, 0.70), (0.51, 0.62, 0.74), (0.45, 0.5, 0.6)
    found = {
        (row, "R = 1"): runs(*scores)
        for row, scores in (("ours", ours), ("top", top), ("low", low))
    }
    shown = Section("x", ["ours", "top", "low", "absent"], ["R = 1"], found, 3)
    theirs = {
        row: ttest_rel(np.array(scores) * 100, np.array(ours) * 100)
        for row, scores in (("top", top), ("low", low))
    }
    rows = list(csv.DictReader(differences_csv([("digits", shown)], "ours").splitlines()))
    assert [(row["row"], row["reference"], row["unit"]) for row in rows] == [
        ("top", "ours", "points"),
        ("low", "ours", "points"),
    ]
    for row in rows:
        test = theirs[row["row"]]
        assert float(row["p"]) == pytest.approx(test.pvalue)
        assert float(row["low"]) == pytest.approx(test.confidence_interval().low)
        assert float(row["p_signs"]) == 0.25
    # Holm: the smaller p of two is doubled, and the other is not below it.
    assert float(rows[1]["p_holm"]) == pytest.approx(2 * theirs["low"].pvalue)
    line = significance_table(shown, "ours").markdown().splitlines()[2]
    assert line.startswith("| top | R = 1 | 3 | +2.33 | -1.46 to +6.13 | 0.118 |")


def test_axes_fit_the_data_and_the_band_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(
        "layerfed.report.comparison_plots.save_picture",
        lambda figure, file, dpi=150: drawn.append(figure) or file,
    )
    config = RunConfig.from_flat({"run.seed": 1})
    noise = {"e1": 2.0, "e2": 3e-16, "e2_masks": 1e-16}
    runs = [
        replace(figures(tmp_path, 0.5, **noise), curves={"accuracy": ((0, 0.48), (1, 0.55))}),
        replace(
            figures(tmp_path, 0.5, config=config, **noise),
            curves={"accuracy": ((0, 0.49), (1, 0.57))},
        ),
    ]
    shown = Section("x", ["a"], ["R = 1"], {("a", "R = 1"): runs}, 2)
    draw_accuracy([shown], tmp_path / "x.png")
    axes = drawn[0].axes[0]
    low, high = axes.get_ylim()
    assert 0.45 < low < 0.48
    assert 0.57 < high < 0.6
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "a",
        "band: mean ± standard deviation, 2 seeds",
    ]
    draw_terms([shown], tmp_path / "x.png")
    first, second, third = drawn[1].axes
    assert first.get_ylim()[1] / first.yaxis.get_transform().linthresh < 10
    for axes in (second, third):
        assert axes.get_yscale() == "linear", "rounding noise has no decades"
        assert axes.get_ylim()[1] > 1e6 * 3e-16


def test_a_constant_with_rounding_noise_is_a_line_in_the_middle() -> None:
    axes = Figure().subplots()
    fit(axes, [0.5, 0.5 + 1e-16], ACCURACY)
    assert axes.get_ylim() == pytest.approx((0.45, 0.55))
    fit(axes, [0.0, 1.0], ACCURACY)
    low, high = axes.get_ylim()
    assert -0.05 < low < 0 < 1 < high < 1.05


def test_a_picture_is_saved_in_three_forms_that_repeat(section: Section, tmp_path: Path) -> None:
    def files() -> dict[str, bytes]:
        draw_accuracy([section], tmp_path / "picture.png")
        return {file.suffix: file.read_bytes() for file in tmp_path.glob("picture.*")}

    found = files()
    assert set(found) == {".png", ".svg", ".pdf"}
    assert found[".pdf"].startswith(b"%PDF")
    assert b"/Type3" not in found[".pdf"], "journals refuse such fonts"
    assert ElementTree.fromstring(found[".svg"]).tag == "{http://www.w3.org/2000/svg}svg"
    assert files() == found
