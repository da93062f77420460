"""Whole rounds on models of one's own that are not as ours: half precision, NaN, and lonely examples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from layerfed.client import workbench as module
from layerfed.config import ConfigError
from layerfed.task.base import Examples
from tests.tiny_task import TinyTask, configured, run

pytestmark = pytest.mark.usefixtures("tiny_task")


@pytest.fixture
def of_model(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[nn.Module], object]], None]:
    """Change the model that the task builds."""
    build = TinyTask.build_model
    module._workbench.cache_clear()

    def change(how: Callable[[nn.Module], object]) -> None:
        def built(task: TinyTask) -> nn.Module:
            model = build(task)
            how(model)
            return model

        monkeypatch.setattr(TinyTask, "build_model", built)

    return change


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_a_model_in_half_precision_is_trained(
    half: torch.dtype, codec: str, of_model: Callable[..., None]
) -> None:
    of_model(lambda model: model.to(half))
    found = run(configured(f"exchange.codec={codec}"), rounds=2)
    module._workbench.cache_clear()
    assert not [f for record in found.rounds for f in record.failures]
    assert {str(t.dtype) for t in found.after.values()} == {"float32", "int64"}
    assert any(not np.array_equal(found.before[n], found.after[n]) for n in found.after)


def test_weights_that_are_not_finite_are_named_at_load(of_model: Callable[..., None]) -> None:
    of_model(lambda model: model.blocks[2].linear.bias.data.fill_(float("nan")))
    with pytest.raises(ConfigError, match=r"NaN or Inf in blocks\.2\.linear\.bias"):
        run(configured())
    module._workbench.cache_clear()


def test_an_example_too_many_for_a_batch_keeps_no_client_from_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """17 examples in batches of 16: BatchNorm cannot be trained on the one that is left."""
    partition = TinyTask.partition

    def seventeen(task: TinyTask, partition_id: int) -> Examples:
        found = partition(task, partition_id)
        return found.select(np.arange(17) % len(found))

    monkeypatch.setattr(TinyTask, "partition", seventeen)
    module._workbench.cache_clear()
    config = configured(
        "train.batch-size=16",
        "train.local-steps=0",
        "train.local-epochs=2",
        "model.batch-norm=trained",
    )
    found = run(config, rounds=2)
    module._workbench.cache_clear()
    assert not [f for record in found.rounds for f in record.failures]
    assert found.rounds[0].replies == 4


@pytest.mark.parametrize(
    ("statistics", "setting", "warned"),
    [(0.0, "auto", True), (0.0, "trained", False), (0.5, "auto", False)],
)
def test_statistics_that_were_never_trained_and_stay_are_named(
    of_model: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    statistics: float,
    setting: str,
    warned: bool,
) -> None:
    def moved(model: nn.Module) -> None:
        for block in model.blocks:
            block.norm.running_mean.fill_(statistics)

    of_model(moved)
    module.workbench(configured(f"model.batch-norm={setting}").to_flat())
    module._workbench.cache_clear()
    assert ("never been trained" in caplog.text) == warned
