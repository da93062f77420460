"""Two configurations are of one run if they come to the same result."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerfed.config import load_config
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


def test_a_path_may_be_written_in_two_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.csv").touch()
    monkeypatch.chdir(tmp_path)
    mine = load_config(None, ["task.data=data.csv"])
    theirs = load_config(None, [f"task.data={tmp_path / 'data.csv'}"]).to_flat()
    assert differing(mine, theirs) == []
    monkeypatch.chdir("/")
    assert differing(mine, theirs) == ["task.data"]


def test_a_key_that_was_not_written_down_differs() -> None:
    theirs = load_config(None).to_flat()
    del theirs["train.lr"]
    assert differing(load_config(None), theirs) == ["train.lr"]
