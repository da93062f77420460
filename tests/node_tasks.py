"""A task for tests of a node's process: it waits as long as a file exists."""

from __future__ import annotations

import time
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
