"""The tiny task in place of the configured one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from layerfed import client_app
from tests.strategies.tiny_task import TinyTask


@pytest.fixture(scope="module")
def tiny_task() -> Iterator[None]:
    """Every workbench of this module's tests works on the tiny task; they share one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_app, "load_task", TinyTask)
        client_app._workbench.cache_clear()
        yield
    client_app._workbench.cache_clear()
