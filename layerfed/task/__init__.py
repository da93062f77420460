"""Data, model and loss of each experiment. A task is one file here, one line in `TASKS`, and a test."""

from __future__ import annotations

from layerfed.config import RunConfig
from layerfed.task.base import Batch, Examples, Task
from layerfed.task.digits import Digits

__all__ = ["TASKS", "Batch", "Examples", "Task", "load_task"]

TASKS: dict[str, type[Task]] = {"digits": Digits}


def load_task(config: RunConfig) -> Task:
    """Return the task a configuration names."""
    return TASKS[config.task.name](config)
