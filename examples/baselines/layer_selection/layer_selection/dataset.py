"""The data of the experiments, with partition, test set and scores: LayerFed's own."""

from layerfed.task import TASKS, load_task

__all__ = ["TASKS", "load_task"]
