"""The runs of a comparison, and the refusals before any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layerfed.compare import Budget, Experiment, Plan, Row, parse_seeds
from layerfed.compare.plan import GRID_KEYS, refuse_grid_keys
from layerfed.config import ConfigError, RunConfig, load_config
from layerfed.strategies import STRATEGIES, checked

HERE = Path("somewhere")


def plan(**changed: Any) -> Plan:
    parts: dict[str, Any] = {
        "name": "table",
        "title": "a table",
        "rows": [Row("full"), Row("top"), Row("both")],
        "budgets": [Budget.parse("1"), Budget.parse("2")],
        "experiments": [Experiment("digits", "Digits", RunConfig())],
        "seeds": [0, 1],
    }
    return Plan(**(parts | changed))


def test_rows_without_a_budget_run_once_a_seed_and_what_is_undefined_is_left_out() -> None:
    names = [cell.config.run.name for cell in plan(seeds=[7]).cells(HERE)]
    assert names == ["full-seed7", "top-R1-seed7", "top-R2-seed7", "both-R2-seed7"]


def test_every_cell_is_another_run() -> None:
    cells = plan(budgets=[Budget.parse(b) for b in (1, 2, "half-normal")]).cells(HERE)
    assert len({cell.folder for cell in cells}) == len(cells) == 2 * (1 + 3 + 2)


def test_a_cell_is_its_experiment_with_budget_row_and_seed_on_top() -> None:
    base = RunConfig.from_flat({"strategy.period": 3, "train.lr": 0.5, "run.seed": 9})
    row = Row("slow one", {"strategy.name": "ilp", "strategy.period": 2})
    [cell] = plan(
        rows=[row],
        budgets=[Budget.parse(2)],
        experiments=[Experiment("digits", "Digits", base, folder="there")],
        seeds=[4],
    ).cells(HERE)
    assert cell.folder == HERE / "there" / "slow-one-R2-seed4"
    changed = {
        key: value
        for key, value in cell.config.to_flat().items()
        if checked(base.simulated()).to_flat()[key] != value
    }
    assert changed == {
        "strategy.period": 2,
        "budget.layers": 2.0,
        "run.seed": 4,
        "run.dir": str(HERE / "there"),
        "run.name": "slow-one-R2-seed4",
    }


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"rows": []}, "there is no row to compare"),
        ({"seeds": []}, "there is no seed to compare"),
        ({"seeds": [1, 1]}, "seed '1' occurs twice"),
        ({"rows": [Row("top"), Row("top")]}, "row 'top' occurs twice"),
        (
            {"rows": [Row("a b", {"strategy.name": "top"}), Row("a-b", {"strategy.name": "snr"})]},
            "rows 'a b' and 'a-b' would share the run folder",
        ),
        (
            {"rows": [Row("top"), Row("top-R1", {"strategy.name": "full"})]},
            "rows 'top' and 'top-R1' would share the run folder",
        ),
        (
            {"budgets": [Budget.parse("4000001"), Budget.parse("4000001.0")]},
            "budget '4000001.0' occurs twice",
        ),
        ({"budgets": [Budget.parse("1"), Budget.parse("1.0")]}, "budget '1' occurs twice"),
        (
            {"rows": [Row("tpo")]},
            "row 'tpo': strategy.name = 'tpo' is not allowed",
        ),
        ({"reference": "all"}, "reference = 'all' is no row; rows: full, top, both"),
    ],
)
def test_what_cannot_be_told_apart_or_is_not_there_is_refused(
    changed: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(**changed).cells(Path("runs"))
    assert says in str(refused.value)


def test_budgets_that_differ_in_the_seventh_digit_have_names_of_their_own() -> None:
    names = [Budget.parse(text).name for text in ("4000001", "4000002", "48e6", "2")]
    assert names == ["4000001.0", "4000002.0", "4.8e+07", "2"]


def test_an_impossible_run_is_named() -> None:
    row = Row("x", {"strategy.name": "ilp", "strategy.period": 0})
    with pytest.raises(
        ConfigError, match=r"^digits/x-R1-seed0: strategy.period = 0 is not allowed"
    ):
        plan(rows=[row]).cells(HERE)


@pytest.mark.parametrize("budget", ["two", "-1", "nan", "inf", ""])
def test_budgets_are_numbers_or_half_normal(budget: str) -> None:
    with pytest.raises(ConfigError, match="is neither a number nor half-normal"):
        Budget.parse(budget)


@pytest.mark.parametrize("seed", ["x", "-1", "1.5", ""])
def test_seeds_are_whole_numbers(seed: str) -> None:
    with pytest.raises(ConfigError, match="is not a whole number from 0"):
        parse_seeds(["0", seed])


@pytest.mark.parametrize("key", GRID_KEYS)
def test_what_the_comparison_decides_cannot_be_set_besides(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"here: {key} is decided by"):
        refuse_grid_keys(["train.lr", key], "here")


def test_all_strategies_can_be_compared_on_the_defaults() -> None:
    """Of those that need another configuration, such as `ranks`, there is no run."""
    cells = plan(rows=[Row(name) for name in STRATEGIES], seeds=[0]).cells(HERE)
    there = {cell.config.strategy.name for cell in cells}
    assert set(STRATEGIES) - there == {"ranks"}


def test_an_option_of_ones_own_strategy_does_not_disturb_other_rows() -> None:
    own = "tests.strategies.own_strategy:Middle"
    base = load_config(None, ["strategy.shift=1"]).simulated()
    experiments = [Experiment("x", "x", base, folder="x")]
    plan = Plan("t", "t", [Row(own, {}), Row("top", {})], [Budget.parse(1)], experiments, [0])
    shifts = {c.row: c.config.to_flat().get("strategy.shift") for c in plan.cells(Path("x"))}
    assert shifts == {own: 1, "top": None}
