"""Tasks for tests of processes: one waits while a file exists, one ends the process that trains."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from torch import Tensor, nn

from layerfed.task.base import Batch
from tests.tiny_task import TinyTask


class Waiting(TinyTask):
    """The tiny task; its loss waits while the file `task.data` exists, and writes one beside it."""

    settings = frozenset({"data"})

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        flag = Path(self.config.task.data)
        while flag.is_file():
            flag.with_suffix(".reached").touch()
            time.sleep(0.02)
        return super().loss(model, batch)


class Deadly(TinyTask):
    """The tiny task; a training step ends its process if the folder `task.data` holds a file.

    The step takes the file away, so that one file is one death.
    """

    settings = frozenset({"data"})

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        for token in Path(self.config.task.data).glob("*"):
            with suppress(FileNotFoundError):  # another process took it
                token.unlink()
                os._exit(1)
        return super().loss(model, batch)
