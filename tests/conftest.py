"""A tiny model with everything that can go wrong in it, and a tiny learning problem."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator

# Tests run side by side, a core each: more threads would only wait for one another. Processes that tests
# start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import Tensor, nn

from layerfed import server_app
from layerfed.client import workbench
from layerfed.flower_compat import enter_run
from layerfed.models.layers import LayerMap
from layerfed.report import draw_run
from layerfed.task.base import Batch

WIDTH, CLASSES, BLOCKS = 6, 3, 4


def pytest_collection_finish() -> None:
    """Take what has been imported out of collections, or each of them walks over a million objects."""
    gc.collect()
    gc.freeze()


class Block(nn.Module):
    """A residual block with BatchNorm and dropout: state that a frozen block must not change."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.tanh(self.norm(self.linear(x))))


class TinyNet(nn.Module):
    """Embedding, four blocks, final norm and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["label"])


@pytest.fixture
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return TinyNet()


@pytest.fixture
def layers(tiny: nn.Module) -> LayerMap:
    return LayerMap.from_model(tiny)


@pytest.fixture
def batches() -> list[Batch]:
    rng = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(8, 5, generator=rng),
            "label": torch.randint(CLASSES, (8,), generator=rng),
        }
        for _ in range(3)
    ]


@pytest.fixture(autouse=True, scope="session")
def own_layer_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The default layer store is the user's cache, which tests must leave alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def without_pictures() -> Iterator[None]:
    """A run in this process draws none, which would take longer than most of these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_app, "draw_run", lambda folder, forms: [])
        yield


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test's runs draw their pictures."""
    monkeypatch.setattr(server_app, "draw_run", draw_run)


@pytest.fixture(autouse=True)
def own_log_level() -> Iterator[None]:
    """A command sets the level of the log, which later tests must not see."""
    logger = logging.getLogger("flwr")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture(autouse=True)
def inside_a_run() -> None:
    """Flower makes messages only inside a run."""
    enter_run()


@pytest.fixture(scope="module")
def tiny_task() -> Iterator[None]:
    """Every workbench of this module's tests works on the tiny task; they share one."""
    from tests.tiny_task import TinyTask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workbench, "load_task", TinyTask)
        workbench._workbench.cache_clear()
        yield
    workbench._workbench.cache_clear()
