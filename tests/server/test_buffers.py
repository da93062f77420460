"""BatchNorm's statistics come through every codec, and a federation of them stays finite."""

from __future__ import annotations

import numpy as np
import pytest

from layerfed.client.workbench import workbench
from layerfed.exchange import CODECS
from tests.fakes import Recorded
from tests.tiny_task import configured, run

pytestmark = pytest.mark.usefixtures("tiny_task")


@pytest.mark.parametrize("codec", CODECS)
def test_buffers_travel_as_they_are_in_every_codec(codec: str) -> None:
    config = configured(f"exchange.codec={codec}", "strategy.name=full", "model.batch-norm=trained")
    grid = Recorded(config)
    found = run(config, rounds=2, grid=grid)
    assert not [failure for record in found.rounds for failure in record.failures]
    layers = workbench(config.to_flat()).resident.layers
    buffers = [name for layer in layers.layers for name in layer.buffers]
    for _, reply in grid.trained():
        arrays = reply.content.array_records["arrays"]
        assert all(arrays[name].dtype in ("float32", "int64") for name in buffers)
    assert all((found.after[n] >= 0).all() for n in buffers if n.endswith("running_var"))
    assert all(np.isfinite(tensor).all() for tensor in found.after.values())


def test_frozen_statistics_stay_and_do_not_travel() -> None:
    config = configured("strategy.name=full")
    grid = Recorded(config)
    found = run(config, rounds=2, grid=grid)
    statistics = [n for n in found.after if "running_" in n or n.endswith("batches_tracked")]
    assert statistics
    assert all(np.array_equal(found.after[n], found.before[n]) for n in statistics)
    assert not np.array_equal(found.after[norm := "blocks.0.norm.weight"], found.before[norm])
    for _, reply in grid.trained():
        assert not set(statistics).intersection(reply.content.array_records["arrays"])
