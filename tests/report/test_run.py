"""Pictures from a run folder's lines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from layerfed.cli import app
from layerfed.exchange.scores import Score
from layerfed.report.plots import draw_run, selection_shares

PNG = b"\x89PNG"


def folder(path: Path, metrics: list[dict[str, Any]], selections: list[dict[str, Any]]) -> Path:
    summary = {"task": "digits", "strategy": "ilp", "seed": 0, "initial_accuracy": 0.1}
    (path / "summary.json").write_text(json.dumps(summary))
    for name, rows in (("metrics", metrics), ("selection", selections)):
        text = "".join(
            json.dumps({"round": i, **row}) + "\n" for i, row in enumerate(rows, start=1)
        )
        (path / f"{name}.jsonl").write_text(text)
    return path


def selection(statistics: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    row = {"layers": ["blocks.0", "blocks.1"], "masks": [[1, 0], [1, 1]]}
    return {**row, "statistics": statistics or {}, **more}


NORMS = {"grad_norm_sq": [[1.0, 2.0], [0.0, 4.0]]}


@pytest.mark.parametrize(
    "terms",
    [
        [{"e1": 3.0, "e2": 0.1}, {"e1": 2.0, "e2": 0.2}],
        [{"e1": None, "e2": 0.1}, {"e1": None, "e2": 0.2}],
        [{"e1": 3.0, "e2": None}, {"e1": None, "e2": None}],
        [{"e1": 0.0, "e2": 0.0}, {"e1": 0.0, "e2": 0.0}],
    ],
    ids=["both", "no probe", "one round", "zero"],
)
def test_the_terms_of_the_theory_are_drawn_where_they_are_known(
    terms: list[dict[str, Any]], tmp_path: Path
) -> None:
    metrics = [{"accuracy": 0.5, **row} for row in terms]
    path = folder(tmp_path, metrics, [selection(NORMS), selection()])
    drawn = draw_run(path)
    assert [file.name for file in drawn] == ["accuracy.png", "layers.png", "theory.png"]
    assert all(file.read_bytes().startswith(PNG) for file in drawn)


def test_a_run_without_the_terms_has_no_picture_of_them(tmp_path: Path) -> None:
    """This includes folders of earlier versions."""
    metrics = [{"accuracy": 0.5}, {"accuracy": None, "e1": None, "e2": None}]
    drawn = draw_run(folder(tmp_path, metrics, [selection(), selection()]))
    assert [file.name for file in drawn] == ["accuracy.png", "layers.png"]


def test_the_picture_of_scores_is_named_by_the_main_one(tmp_path: Path) -> None:
    rows = [{"accuracy": None, "scores": {"rmse": x, "r2": 0.5, "loss": x * x}} for x in (2.0, 1.0)]
    path = folder(tmp_path, rows, [selection(), selection()])
    summary = json.loads((path / "summary.json").read_text())
    metric = Score("rmse", higher_is_better=False, high=math.inf).to_json()
    (path / "summary.json").write_text(json.dumps(summary | {"metric": metric}))
    assert [file.name for file in draw_run(path)] == [
        "rmse.png",
        "layers.png",
        "scores.png",
    ]


def test_shares_are_of_clients_that_updated_a_layer() -> None:
    """Layers of failed clients, and layers left out after training, do not count."""
    rows = [selection(), selection(updated=[[0, 0], [1, 0]])]
    np.testing.assert_array_equal(selection_shares(rows), [[1.0, 0.5], [0.5, 0.0]])


@pytest.mark.parametrize(
    ("left", "says"),
    [
        ({"summary.json": "{"}, "summary.json is damaged"),
        ({"metrics.jsonl": '{\n{"round": 1}\n'}, "metrics.jsonl, line 1 is damaged"),
    ],
)
def test_a_damaged_folder_is_refused(left: dict[str, str], says: str, tmp_path: Path) -> None:
    folder(tmp_path, [{"accuracy": 0.5}], [selection()])
    for name, text in left.items():
        (tmp_path / name).write_text(text)
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())
