"""Predictions of a run's model on files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

import torch

from layerfed.client.memory import rows_that_fit
from layerfed.config import ConfigError
from layerfed.export.saved import SavedRun

__all__ = ["predictions", "write_rows"]

CPU = torch.device("cpu")


def predictions(saved: SavedRun, files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Yield a row for each input: its name, and what the task's kind predicts for it.

    Raises
    ------
    ConfigError
        If a file does not exist or cannot be read, or if an input has no prediction.
    """
    task, files = saved.task, list(files)
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{file} is no file here")
    size = saved.config.run.evaluate_batch or rows_that_fit(task, saved.model, CPU)
    for file in files:
        found = task.read(file)
        names = iter(found.names)
        means = iter(found.means or [()] * len(found.names))
        with torch.inference_mode():
            for batch in found.examples.in_order(size, CPU):
                try:
                    rows = task.kind.predicted(task, saved.model, batch)
                except RuntimeError as error:
                    raise ConfigError(
                        f"the model does not take what task.name = '{saved.config.task.name}' read "
                        f"in {file}: {str(error).splitlines()[0]}"
                    ) from error
                if len(rows) != (inputs := len(next(iter(batch.values())))):
                    raise ConfigError(
                        f"task.name = '{saved.config.task.name}' predicted {len(rows)} rows for "
                        f"{inputs} inputs of {file}; it should be one for each"
                    )
                for row in rows:
                    yield {"input": next(names), **task.kind.explained(row, next(means))}


def write_rows(
    rows: Iterable[Mapping[str, Any]], form: Literal["csv", "json"], stream: TextIO
) -> None:
    """Write predictions as they come: CSV with a column for each score, or a JSON object a line.

    In CSV the items of a list are joined by "; ".
    """
    writer: Any = None
    for row in rows:
        if form == "json":
            stream.write(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n")
            continue
        flat: dict[str, Any] = {}
        for key, value in row.items():
            if isinstance(value, dict):
                flat |= {f"{key.removesuffix('s')} {name}": each for name, each in value.items()}
            else:
                flat[key] = "; ".join(map(str, value)) if isinstance(value, list) else value
        if writer is None:
            writer = csv.DictWriter(stream, fieldnames=list(flat), lineterminator="\n")
            writer.writeheader()
        writer.writerow(flat)


def _finite(value: Any) -> Any:
    """Return a prediction with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
