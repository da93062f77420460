"""The code of docs/own-task.md, run as a reader would run it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from layerfed.config import load_config
from layerfed.engine import run_on
from layerfed.export import SavedRun, predictions

GUIDE = (Path(__file__).parents[2] / "docs/own-task.md").read_text(encoding="utf-8")
MODULES = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", GUIDE, re.DOTALL))
COMMANDS = re.findall(r"```bash\nlayerfed run (.*?)\n```", GUIDE)
QUICK = ["federation.clients=4", "federation.rounds=6", "budget.layers=2", "task.local-test=0.2"]


def test_each_module_has_a_command_and_is_short() -> None:
    assert len(MODULES) == len(COMMANDS) == 7
    for name, code in MODULES.items():
        assert any(f"task.name={name}:" in command for command in COMMANDS)
        assert len(code.splitlines()) < 40, name


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: re.findall(r"=(\w+):", c)[0])
def test_the_guide_runs(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in MODULES.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    settings = [*shlex.split(command), *QUICK, f"run.dir={tmp_path}", "run.name=x"]
    folder = run_on("inprocess", load_config(None, settings))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["failures"] == 0
    before = summary["initial_scores"][summary["metric"]["name"]]
    better = summary["best"]["value"] - before
    assert better > 0 if summary["metric"]["higher_is_better"] else better < 0
    if "Appraisal" in command:
        (tmp_path / "houses.csv").write_text("0,0,0,0,0,0,0,0\n2,1,1,0,0,0,0,0\n")
        cheap, dear = predictions(SavedRun.open(folder), [tmp_path / "houses.csv"])
        assert cheap["input"].endswith("houses.csv:0")
        assert dear["value"] - cheap["value"] > 2, "the true difference is 4"
