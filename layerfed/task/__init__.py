"""Data, model and loss of each experiment. A task is one file here, one line in `TASKS`, and a test."""

from __future__ import annotations

from importlib import import_module

from layerfed.config import ConfigError, RunConfig
from layerfed.extras import naming_extras
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
    """Return the task a configuration names, in `TASKS` or as `module:Class`.

    Raises
    ------
    ConfigError
        If there is no such module or class, or it is no task.
    """
    asked = config.task.name
    module, _, name = TASKS.get(asked, asked.replace(":", ".")).rpartition(".")
    try:
        with naming_extras(f"task.name = '{asked}'"):
            found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"task.name = '{asked}' cannot be imported: {error}; its module must be installed, or lie "
            "in the current folder of `layerfed` or a folder of PYTHONPATH, on the server and on every "
            "client"
        ) from None
    with naming_extras(f"task.name = '{asked}'"):
        task = found(config)
    if not isinstance(task, Task):
        raise ConfigError(f"task.name = '{asked}' is no layerfed.task.Task")
    return task
