"""Data, model and loss of each experiment. A task is one file here, one line in `TASKS`, and a test."""

from __future__ import annotations

from importlib import import_module

from layerfed.config import RunConfig
from layerfed.task.base import Batch, Examples, Task

__all__ = ["TASKS", "Batch", "Examples", "Task", "load_task"]

# By name of the class (or what returns one), imported when it is used: a task's libraries cost seconds,
# and on real devices every message starts a new process.
TASKS: dict[str, str] = {
    "digits": "layerfed.task.digits.Digits",
    "cifar10": "layerfed.task.cifar10.Cifar10",
    "domainnet": "layerfed.task.domainnet.DomainNet",
    "xglue_nc": "layerfed.task.xglue_nc.XglueNc",
    "qa": "layerfed.task.qa.QuestionAnswering",
    "custom": "layerfed.task.custom.custom",
}


def load_task(config: RunConfig) -> Task:
    """Return the task a configuration names."""
    module, _, name = TASKS[config.task.name].rpartition(".")
    task: Task = getattr(import_module(module), name)(config)
    return task
