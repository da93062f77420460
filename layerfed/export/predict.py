"""Predictions of a run's model on files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

import torch

from layerfed.client.memory import rows_that_fit
from layerfed.config import ConfigError
from layerfed.export.saved import SavedRun
from layerfed.task.scoring import SingleLabel

__all__ = ["predictions", "write_rows"]

CPU = torch.device("cpu")


def predictions(saved: SavedRun, files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Yield a row for each input: its name, the predicted label, and the score of each class.

    Scores are probabilities. If the classes of an input stand for answers of its own, the row has the
    predicted answer too.

    Raises
    ------
    ConfigError
        If a file does not exist or cannot be read, or if the task gives an input no single class.
    """
    if saved.task.kind is not SingleLabel:
        raise ConfigError(
            f"task.name = '{saved.config.task.name}' is of kind {saved.task.kind.__name__}; predictions "
            "are for tasks with one class for each input (SingleLabel): use the exported model"
        )
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{file} is no file here")
        found = saved.task.read(file)
        size = saved.config.run.evaluate_batch or rows_that_fit(saved.task, saved.model, CPU)
        row = 0
        with torch.inference_mode():
            for batch in found.examples.in_order(size, CPU):
                for outputs in saved.task.logits(saved.model, batch):
                    named = {"input": found.names[row], **_described(saved, outputs)}
                    if found.answers is not None:
                        named["answer"] = found.answers[row][int(outputs.argmax())]
                    yield named
                    row += 1


def _described(saved: SavedRun, outputs: torch.Tensor) -> dict[str, Any]:
    """Return what a model's outputs for one input say."""
    names = saved.task.classes or [str(i) for i in range(len(outputs))]
    scores = outputs.float().softmax(0).tolist()
    label = names[int(outputs.argmax())]
    return {"label": label, "scores": dict(zip(names, scores, strict=True))}


def write_rows(
    rows: Iterable[Mapping[str, Any]], form: Literal["csv", "json"], stream: TextIO
) -> None:
    """Write predictions as they come: CSV with a column for each score, or a JSON object a line."""
    writer: Any = None
    for row in rows:
        if form == "json":
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            continue
        flat = {**row, **{f"score {name}": value for name, value in row["scores"].items()}}
        del flat["scores"]
        if writer is None:
            writer = csv.DictWriter(stream, fieldnames=list(flat), lineterminator="\n")
            writer.writeheader()
        writer.writerow(flat)
