"""Two configurations are of one run if they come to the same result."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerfed.config import RunConfig, load_config
from layerfed.config.same import differing
from layerfed.strategies import checked, option_defaults

DEFAULTS = option_defaults("ilp")


@pytest.mark.parametrize(
    ("setting", "to_be_done", "to_go_on"),
    [
        ("train.lr=0.02", ["train.lr"], ["train.lr"]),
        ("run.seed=7", ["run.seed"], ["run.seed"]),
        ("run.name=another", [], []),
        ("run.dir=elsewhere", [], []),
        ("federation.timeout=7", [], []),
        ("federation.rounds=7", ["federation.rounds"], []),
    ],
)
def test_what_may_differ(setting: str, to_be_done: list[str], to_go_on: list[str]) -> None:
    mine, theirs = load_config(None), load_config(None, [setting]).to_flat()
    assert differing(mine, theirs, DEFAULTS) == to_be_done
    assert differing(mine, theirs, DEFAULTS, goes_on=True) == to_go_on


def test_a_setting_that_an_older_run_did_not_have_counts_as_its_default() -> None:
    config = checked(RunConfig())
    theirs = config.to_flat()
    del theirs["train.lr"], theirs["strategy.solver-gap"]
    assert differing(config, theirs, DEFAULTS) == []
    changed = load_config(None, ["train.lr=1", "strategy.solver-gap=0.5"])
    assert differing(changed, theirs, DEFAULTS) == ["strategy.solver-gap", "train.lr"]


def test_an_option_counts_under_its_key_however_it_was_given() -> None:
    """Where only declared keys pass, `strategy.options` carries it."""
    config = checked(load_config(None, ["strategy.consistency=2"]))
    theirs = config.to_flat() | {"strategy.options": "consistency=2"}
    assert differing(config, theirs, DEFAULTS) == []


def test_a_path_may_be_written_in_two_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.csv").touch()
    monkeypatch.chdir(tmp_path)
    mine = load_config(None, ["task.data=data.csv"])
    theirs = load_config(None, [f"task.data={tmp_path / 'data.csv'}"]).to_flat()
    assert differing(mine, theirs, DEFAULTS) == []
    monkeypatch.chdir("/")
    assert differing(mine, theirs, DEFAULTS) == ["task.data"]


def test_a_setting_of_a_users_own_task_that_is_no_longer_given_makes_another_run() -> None:
    mine = load_config(None, ["task.name=a:B"])
    theirs = load_config(None, ["task.name=a:B", "task.noise=0.2"]).to_flat()
    assert differing(mine, theirs, DEFAULTS) == ["task.noise"]
    assert differing(load_config(None, ["task.name=a:B", "task.noise=0.2"]), theirs, {}) == []


def test_an_option_without_a_default_counts() -> None:
    mine = load_config(None, ["strategy.name=a:B"])
    theirs = mine.to_flat() | {"strategy.half": 0.5}
    assert differing(mine, theirs, {"strategy.half": None}) == ["strategy.half"]
    assert differing(mine, mine.to_flat(), {"strategy.half": None}) == []
