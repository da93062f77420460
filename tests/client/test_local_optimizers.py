"""Local optimisers give torch's result without torch's imports, one parameter at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from layerfed.client.local_optimizers import (
    Clipped,
    InPart,
    LocalAdamW,
    LocalOptimizer,
    LocalSGD,
    moved_alone,
)
from layerfed.client.training import Step, train_layers
from layerfed.client_app import local_optimizer
from layerfed.models.layers import LayerMap
from layerfed.task.base import Batch
from tests.conftest import TinyNet, cross_entropy
from tests.tiny_task import configured

Make = Callable[[list[nn.Parameter]], LocalOptimizer]
OURS: dict[str, Make] = {
    "sgd": partial(LocalSGD, lr=0.1),
    "momentum": partial(LocalSGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": partial(LocalAdamW, lr=0.01, weight_decay=0.1),
}
TORCHS: dict[str, Make] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OURS)
def test_its_steps_are_torchs(tiny: nn.Module, name: str) -> None:
    """Over several steps, in which one parameter gets no gradient at first."""
    other = copy.deepcopy(tiny)
    ours, theirs = OURS[name](list(tiny.parameters())), TORCHS[name](list(other.parameters()))
    started = tiny.head.weight.detach().clone()
    for step in range(4):
        x, y = torch.randn(8, 5), torch.randint(3, (8,))
        for net, optimizer in ((tiny, ours), (other, theirs)):
            net.embed.requires_grad_(step > 1)
            torch.manual_seed(step)
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert all(p.grad is None for p in net.parameters())
    for (key, mine), expected in zip(tiny.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, expected), key
    assert not torch.equal(tiny.head.weight, started)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_head_has_its_own_rate_as_in_torchs_groups(tiny: nn.Module, name: str) -> None:
    """Three times that of the blocks, in a round in which both are at half."""
    config = configured(f"train.optimizer={name}", "train.lr=0.02", "train.head-lr=0.06").train
    layers, other = LayerMap.from_model(tiny), copy.deepcopy(tiny)
    ours = local_optimizer(config, 0.01, tiny, layers)(list(tiny.parameters()))
    head = set(layers["head"].trained)
    groups = [
        {"params": [p for key, p in other.named_parameters() if (key in head) == of_head], "lr": lr}
        for of_head, lr in ((False, 0.01), (True, 0.03))
    ]
    theirs = {"sgd": torch.optim.SGD, "adamw": partial(torch.optim.AdamW, weight_decay=0.0)}[name](
        groups
    )
    for step in range(3):
        x, y = torch.randn(8, 5), torch.randint(3, (8,))
        for net, optimizer in ((tiny, ours), (other, theirs)):
            torch.manual_seed(step)
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (key, mine), expected in zip(tiny.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, expected), key


def in_part(make: Make, parameters: list[nn.Parameter]) -> InPart:
    """The first half of each matrix's rows stays."""
    matrices = [p for p in parameters if p.dim() > 1]
    return InPart(make(parameters), [(p, (slice(len(p) // 2),)) for p in matrices])


@pytest.mark.parametrize("micro", [0, 3])
@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("name", OURS)
def test_training_that_moves_one_parameter_at_a_time_is_training_by_whole_steps(
    batches: list[Batch], name: str, part: bool, micro: int
) -> None:
    ends = []
    for make in (OURS[name], TORCHS[name]):
        torch.manual_seed(0)
        model = TinyNet()
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        build = partial(in_part, make) if part else make
        assert (moved_alone(build(list(model.parameters()))) is None) == (make is TORCHS[name])
        torch.manual_seed(5)  # dropout
        layers, mask = LayerMap.from_model(model), [True, False, True, True]
        how = Step(micro_batch=micro)
        found = train_layers(model, layers, mask, batches * 2, cross_entropy, build, how=how)
        ends.append((found.memory, model.state_dict()))
        half = len(before["head.weight"]) // 2
        stays = torch.equal(model.head.weight[:half], before["head.weight"][:half])
        assert stays == part
        assert not torch.equal(model.head.weight[half:], before["head.weight"][half:])
    for key, tensor in ends[0][1].items():
        assert torch.equal(tensor, ends[1][1][key]), key
    if not micro:
        assert ends[0][0].gradients < 0.3 * ends[1][0].gradients
    assert ends[0][0].optimizer <= ends[1][0].optimizer


def test_what_needs_all_gradients_is_not_moved_alone(tiny: nn.Module) -> None:
    """A bound on their norm, torch's optimisers, and one of a user's own with a step of its own."""

    class Own(LocalSGD):
        def step(self) -> None:
            super().step()

    parameters = list(tiny.parameters())
    sgd = LocalSGD(parameters, 0.1)
    for optimizer in (
        *(Clipped(sgd, parameters, 1.0), InPart(Clipped(sgd, parameters, 1.0), [])),
        *(Own(parameters, 0.1), torch.optim.SGD(parameters, 0.1)),
    ):
        assert moved_alone(optimizer) is None
    assert moved_alone(sgd) is not None


@pytest.mark.parametrize(("bound", "share"), [(0.5, 0.1), (5.0, 1.0), (50.0, 1.0)])
def test_a_gradient_above_the_bound_is_scaled_down_as_a_whole(bound: float, share: float) -> None:
    """The norm of (3, 4) is 5, over both parameters together."""
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    optimizer = Clipped(LocalSGD(parameters, 1.0), parameters, bound)
    for parameter, gradient in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([gradient])
    optimizer.step()
    optimizer.zero_grad()
    moved = [parameter.item() for parameter in parameters]
    assert moved == pytest.approx([-3 * share, -4 * share], rel=1e-5)
    assert all(parameter.grad is None for parameter in parameters)
