"""Two configurations are of one run if they come to the same result."""

from __future__ import annotations

import pytest

from layerfed.config import RunConfig, load_config
from layerfed.config.same import differing


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
    assert differing(mine, theirs) == to_be_done
    assert differing(mine, theirs, goes_on=True) == to_go_on


def test_a_setting_that_an_older_run_did_not_have_counts_as_its_default() -> None:
    config = RunConfig()
    theirs = {k: v for k, v in config.to_flat().items() if k != "strategy.options"}
    assert differing(config, theirs) == []
    changed = RunConfig.from_flat({"strategy.options": "shift=1"})
    assert differing(changed, theirs) == ["strategy.options"]
