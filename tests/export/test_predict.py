"""What each kind of task predicts, against the formula of its outputs."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from layerfed.config import ConfigError
from layerfed.export import SavedRun, predict, predictions, write_rows
from layerfed.task import Examples, Inputs
from layerfed.task.scoring import (
    CausalLM,
    Generation,
    MultiLabel,
    Regression,
    SingleLabel,
    Tally,
    TokenTagging,
)
from tests.tiny_task import TinyTask, configured


def rows_of(kind: type[Tally], outputs: Tensor, **more: Any) -> list[dict[str, Any]]:
    """Return the predictions of a task whose model returns these outputs."""

    class Fixed(TinyTask):
        def read(self, file: Path) -> Inputs:
            names = [f"{file.name}:{n}" for n in range(len(outputs))]
            return Inputs(names, Examples.of({"x": outputs, **more.get("batch", {})}), means)

        def logits(self, model: nn.Module, batch: Any) -> Tensor:
            return cast(Tensor, batch["x"])

        def answers(self, model: nn.Module, batch: Any) -> Any:
            return ["yes" if x[0, 0] > 0 else "no" for x in batch["x"]], ["?"] * len(batch["x"])

    means = more.get("means")
    Fixed.kind, Fixed.classes = kind, more.get("classes", ())
    config = configured("run.evaluate-batch=2")
    saved = SavedRun(Path(), config, Fixed(config), nn.Identity(), cast(Any, None), 1)
    return list(predictions(saved, [Path(__file__)]))


def test_one_label_has_the_probability_of_each_class_and_its_answer() -> None:
    outputs = torch.tensor([[0.0, 1.0], [3.0, 0.0], [0.0, 0.0]])
    rows = rows_of(
        SingleLabel, outputs, classes=("a", "b"), means=[["w", "x"], ["y", "z"], ["u", "v"]]
    )
    assert [row["input"] for row in rows] == [f"test_predict.py:{n}" for n in range(3)]
    assert [row["label"] for row in rows] == ["b", "a", "a"]
    assert [row["answer"] for row in rows] == ["x", "y", "u"]
    e = torch.e
    assert rows[0]["scores"] == pytest.approx({"a": 1 / (1 + e), "b": e / (1 + e)})


def test_several_labels_are_those_above_one_half() -> None:
    rows = rows_of(MultiLabel, torch.tensor([[1.0, 0.0, 0.1], [-1.0, -2.0, -3.0]]))
    assert [row["labels"] for row in rows] == [["0", "2"], []]
    assert rows[1]["scores"]["0"] == pytest.approx(1 / (1 + torch.e))


def test_numbers_are_given_as_they_are() -> None:
    assert [r["value"] for r in rows_of(Regression, torch.tensor([0.5, -2.0, 7.0]))] == [0.5, -2, 7]
    (row,) = rows_of(Regression, torch.tensor([[0.5, 2.0]]), classes=("low", "high"))
    assert row["values"] == {"low": 0.5, "high": 2.0}


def test_each_token_has_a_tag_and_outputs_without_a_token_are_left_out() -> None:
    outputs = torch.zeros(2, 3, 2)
    outputs[0, 1, 1] = outputs[1, 2, 1] = torch.tensor(3.0).log()
    rows = rows_of(TokenTagging, outputs, classes=("O", "NAME"))
    assert [row["tags"] for row in rows] == [["O", "NAME", "O"], ["O", "O", "NAME"]]
    assert rows[0]["scores"] == pytest.approx([0.5, 0.75, 0.5])
    first, _ = rows_of(
        TokenTagging,
        outputs,
        classes=("O", "NAME"),
        means=[["in", "Rome", None], [None, None, None]],
    )
    assert (first["tokens"], first["tags"]) == (["in", "Rome"], ["O", "NAME"])


def test_a_text_has_its_perplexity_and_a_generated_answer() -> None:
    outputs = torch.zeros(3, 4, 8)
    label = torch.tensor([[1, 2, -100, -100]] * 3)
    rows = rows_of(CausalLM, outputs, batch={"label": label})
    assert [row["perplexity"] for row in rows] == pytest.approx([8.0] * 3)
    outputs[1, 0, 0] = 1
    assert [row["answer"] for row in rows_of(Generation, outputs)] == ["no", "yes", "no"]


def test_the_rows_that_fit_are_counted_once_for_all_files(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    monkeypatch.setattr(predict, "rows_that_fit", lambda *given: counted.append(given) or 2)
    config = configured()
    task = TinyTask(config)
    monkeypatch.setattr(task, "read", lambda file: Inputs([str(file)] * 10, task.partition(0)))
    saved = SavedRun(Path(), config, task, task.build_model(), cast(Any, None), 1)
    assert len(list(predictions(saved, [Path(__file__)] * 3))) == 30
    assert len(counted) == 1


def test_a_kind_that_says_nothing_of_one_input_is_refused() -> None:
    class Silent(SingleLabel):
        predicted = staticmethod(Tally.predicted)

    with pytest.raises(ConfigError, match="Silent says nothing of one input"):
        rows_of(Silent, torch.zeros(1, 2))


def test_an_input_without_a_prediction_shifts_no_other() -> None:
    class Some(SingleLabel):
        @staticmethod
        def predicted(task: Any, model: nn.Module, batch: Any) -> list[dict[str, Any]]:
            return SingleLabel.predicted(task, model, batch)[:1]

    with pytest.raises(ConfigError, match=r"predicted 1 rows for 2 inputs of .*one for each"):
        rows_of(Some, torch.zeros(3, 2))


def test_inputs_that_the_model_does_not_take_are_refused_with_their_file() -> None:
    class Narrow(SingleLabel):
        @staticmethod
        def predicted(task: Any, model: nn.Module, batch: Any) -> list[dict[str, Any]]:
            nn.Linear(3, 2)(batch["x"])
            return []

    with pytest.raises(ConfigError, match=r"does not take what .* read in .*test_predict.py: mat1"):
        rows_of(Narrow, torch.zeros(3, 2))


def test_lists_and_mappings_fit_into_csv() -> None:
    row = {"input": "x", "labels": ["a", "b"], "scores": {"a": 0.9, "b": 0.6}}
    text, lines = io.StringIO(), io.StringIO()
    write_rows([row], "csv", text)
    assert text.getvalue() == "input,labels,score a,score b\nx,a; b,0.9,0.6\n"
    write_rows([row], "json", lines)
    assert json.loads(lines.getvalue()) == row


def test_numbers_that_json_lacks_are_null() -> None:
    lines = io.StringIO()
    write_rows([{"scores": {"loss": math.nan}, "each": [math.inf, 1.0]}], "json", lines)
    assert lines.getvalue() == '{"scores": {"loss": null}, "each": [null, 1.0]}\n'
