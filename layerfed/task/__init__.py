"""The data, model and loss of each experiment: a task is one file, one line in `TASKS`, and a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from layerfed.config import ConfigError, RunConfig, imported, nearest
from layerfed.config.errors import naming_extras
from layerfed.task.base import Batch, Examples, Inputs, Task

__all__ = ["TASKS", "Batch", "Examples", "Inputs", "Task", "load_task", "task_named"]

# Each task by the name of its class (or of a function that returns one). It is imported when it is used,
# since a task's libraries take seconds to import and on real devices every message starts a new process.
TASKS: dict[str, str] = {
    "digits": "layerfed.task.digits:Digits",
    "scanners": "layerfed.task.scanners:Scanners",
    "cifar10": "layerfed.task.cifar10:Cifar10",
    "domainnet": "layerfed.task.domainnet:DomainNet",
    "xglue_nc": "layerfed.task.xglue_nc:XglueNc",
    "qa": "layerfed.task.qa:QuestionAnswering",
    "custom": "layerfed.task.custom:custom",
    "instructions": "layerfed.task.instructions:Instructions",
}


def task_named(asked: str) -> Callable[[RunConfig], Any]:
    """Return the class of a task, in `TASKS` or as `module:Class`.

    Raises
    ------
    ConfigError
        If there is no such task, module or class.
    """
    if asked not in TASKS and ":" not in asked:
        raise ConfigError(
            f"task.name = '{asked}' is not allowed: it should be one of {', '.join(TASKS)}, or a task "
            f"of your own as module:Class{nearest(asked, TASKS)}"
        )
    found: Callable[[RunConfig], Any] = imported(TASKS.get(asked, asked), "task.name")
    return found


def load_task(config: RunConfig) -> Task:
    """Return the task a configuration names.

    Raises
    ------
    ConfigError
        If there is none of that name, it is no task, or its settings cannot be used.
    """
    asked = config.task.name
    found = task_named(asked)
    if isinstance(found, type) and not issubclass(found, Task):
        raise ConfigError(f"task.name = '{asked}' is no layerfed.task.Task")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise ConfigError(f"task.name = '{asked}' lacks the method {missing[0]}")
    with naming_extras(f"task.name = '{asked}'"):
        task = found(config)
    if not isinstance(task, Task):
        raise ConfigError(f"task.name = '{asked}' is no layerfed.task.Task")
    return task
