"""Local SGD gives torch's result without torch's imports."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from layerfed.client.local_sgd import Clipped, LocalSGD


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_its_steps_are_torchs(tiny: nn.Module, momentum: float, decay: float) -> None:
    """Over several steps, in which one parameter gets no gradient at first."""
    other = copy.deepcopy(tiny)
    ours = LocalSGD(list(tiny.parameters()), 0.1, momentum, decay)
    theirs = torch.optim.SGD(other.parameters(), 0.1, momentum, weight_decay=decay)
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
    for (name, mine), expected in zip(tiny.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, expected), name
    assert not torch.equal(tiny.head.weight, started)


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
