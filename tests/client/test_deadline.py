"""A client that is out of time has trained the layers that backward had reached, and no others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from layerfed.client.deadline import Clock
from layerfed.client.local_optimizers import Clipped, LocalAdamW, LocalSGD
from layerfed.client.training import Step, TrainResult, train_layers
from layerfed.models.layers import LayerMap
from layerfed.task.base import Batch
from tests.client.test_training import sgd, state, without_dropout
from tests.conftest import TinyNet, cross_entropy

CPU = torch.device("cpu")
MASK = [True, False, True, True]
# As backward reaches them.
ORDER = ["head", "blocks.3", "blocks.2", "blocks.0"]
Optimizer = Callable[[list[nn.Parameter]], object]


class Asked(Clock):
    """A clock on which a given number of questions are asked in time."""

    def __init__(self, times: int) -> None:
        super().__init__(1.0, CPU)
        self.left = times

    @property
    def over(self) -> bool:
        self.left -= 1
        return self.left < 0


def local(parameters: list[nn.Parameter]) -> LocalSGD:
    return LocalSGD(parameters, 0.3)


def clipped(parameters: list[nn.Parameter]) -> Clipped:
    return Clipped(LocalSGD(parameters, 0.3), parameters, 0.05)


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": local,
    "torch": sgd(0.3),
    "adamw": partial(LocalAdamW, lr=0.1, weight_decay=0.1),
    "torch's adamw": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
    "clipped": clipped,
}


def by_hand(
    model: nn.Module,
    layers: LayerMap,
    batches: list[Batch],
    optimizer: Optimizer,
    steps: int,
    finished: list[str],
) -> dict[str, Tensor]:
    """Whole steps, and one on the finished layers alone, whose gradients are those of the whole."""
    own = without_dropout(TinyNet())
    own.load_state_dict(model.state_dict())
    own.eval()
    for block, on in zip(own.blocks, MASK, strict=True):
        block.train(on)
    parameters = dict(own.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    names = [name for layer in ORDER for name in layers[layer].parameters]
    trained = [parameters[n] for n in parameters if n in names]
    for parameter in trained:
        parameter.requires_grad_(True)
    mine = optimizer(trained)
    for number, batch in enumerate(batches[: steps + bool(finished)]):
        cross_entropy(own, batch).backward()
        if number == steps:
            for layer in set(ORDER) - set(finished):
                for name in layers[layer].parameters:
                    parameters[name].grad = None
        mine.step()  # type: ignore[attr-defined]
        mine.zero_grad()  # type: ignore[attr-defined]
    return own.state_dict()


def cut(
    tiny: nn.Module,
    layers: LayerMap,
    batches: list[Batch],
    optimizer: Optimizer,
    times: int,
    **more: Step,
) -> TrainResult:
    return train_layers(
        *(without_dropout(tiny), layers, MASK, batches, cross_entropy, optimizer),
        clock=Asked(times),
        **more,
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("reached", [1, 2, 3])
def test_in_the_first_step_the_finished_layers_have_moved_as_in_a_whole_step(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch], optimizer: str, reached: int
) -> None:
    make = OPTIMIZERS[optimizer]
    expected = by_hand(tiny, layers, batches, make, 0, ORDER[:reached])
    result = cut(tiny, layers, batches, make, reached)
    assert result.late
    assert result.layers == tuple(ORDER[:reached])
    assert result.steps == 1
    for name in (p for layer in ORDER for p in layers[layer].parameters):
        assert torch.equal(tiny.state_dict()[name], expected[name]), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_later_all_layers_are_sent_and_the_finished_ones_are_one_step_ahead(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch], optimizer: str
) -> None:
    make = OPTIMIZERS[optimizer]
    expected = by_hand(tiny, layers, batches, make, 1, ORDER[:2])
    result = cut(tiny, layers, batches, make, len(ORDER) + 1 + 2)
    assert result.late
    assert set(result.layers) == set(ORDER)
    assert result.steps == 2
    for name in (p for layer in ORDER for p in layers[layer].parameters):
        assert torch.equal(tiny.state_dict()[name], expected[name]), name


def test_a_client_without_time_for_the_head_has_moved_nothing_and_knows_its_loss(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    before = state(tiny)
    with torch.no_grad():
        loss = float(cross_entropy(without_dropout(tiny).eval(), batches[0]))
    result = cut(tiny, layers, batches, local, 0)
    assert (result.layers, result.steps, result.late) == ((), 1, True)
    assert result.loss == pytest.approx(loss, rel=0.5)
    for name, parameter in tiny.named_parameters():
        assert torch.equal(parameter, before[name])


def test_parts_of_a_batch_finish_no_layer_before_the_last(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    for make in (local, OPTIMIZERS["adamw"]):
        before = state(tiny)
        size = len(batches[0]["label"])
        result = cut(tiny, layers, batches, make, 3, how=Step(micro_batch=size // 2))
        assert result.layers == ()
        for name, parameter in tiny.named_parameters():
            assert torch.equal(parameter, before[name])


def test_time_that_lasts_changes_nothing(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    without_dropout(tiny)
    start = state(tiny)
    whole = train_layers(tiny, layers, MASK, batches, cross_entropy, local)
    moved = state(tiny)
    tiny.load_state_dict(start)
    with Clock(1e9, CPU, speed=1.0) as clock:
        result = train_layers(tiny, layers, MASK, batches, cross_entropy, local, clock=clock)
    assert not result.late
    assert result.flops == whole.flops == clock.flops
    assert (result.steps, result.layers) == (len(batches), whole.layers)
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(tensor, moved[name])


def test_real_time_ends_the_training_and_begins_one_step(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    clock = Clock(1e-9, CPU)
    result = train_layers(tiny, layers, MASK, batches, cross_entropy, local, clock=clock)
    assert (result.layers, result.late, clock.flops) == ((), True, 0.0)


def test_a_simulated_clients_time_is_its_flops_by_its_speed(
    tiny: nn.Module, layers: LayerMap, batches: list[Batch]
) -> None:
    """Twice the speed, or twice the time, and a client gets equally far; half, and it gets less far."""
    step = train_layers(tiny, layers, MASK, batches[:1], cross_entropy, local).flops

    def reached(seconds: float, speed: float) -> tuple[int, int]:
        with Clock(seconds, CPU, speed) as clock:
            found = train_layers(tiny, layers, MASK, batches, cross_entropy, local, clock=clock)
        return found.steps, len(found.layers)

    assert reached(0.9, step) == reached(0.45, 2 * step) == (1, 4 - 1)
    assert reached(0.4, step)[1] < 3
    assert reached(1.7, step) == (2, 4)
