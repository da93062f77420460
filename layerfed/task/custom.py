"""Your own images or texts with a label, without code.

Images: folders `CLASS/image`, `GROUP/CLASS/image`, both also below `train/` and `test/`; or tables with
a column of images or of their paths. Text: CSV, TSV, JSON lines or parquet with columns of text and a
label. The model decides between the two: it reads texts or images.
"""

from __future__ import annotations

from layerfed.config import FAMILIES, RunConfig
from layerfed.task.base import Task


def custom(config: RunConfig) -> Task:
    """Return the task for the kind of data that the model is for."""
    # Imported late: each of the two kinds needs libraries that the other does without.
    if FAMILIES[config.model.family] == "text":
        from layerfed.task.text import TextTask

        return TextTask(config)
    from layerfed.task.images import ImageTask

    return ImageTask(config)
