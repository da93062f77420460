"""Local SGD (eq. 2) without torch's optimiser, and steps with clipped gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["Clipped", "InPart", "LocalOptimizer", "LocalSGD"]


Index = tuple[slice, ...]


class LocalOptimizer(Protocol):
    """The interface of a local optimiser; every optimiser of torch has it."""

    def step(self) -> object:
        """Move the parameters by their gradients."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""


class LocalSGD:
    """Local SGD (eq. 2) with momentum and weight decay, equal to `torch.optim.SGD` to the bit.

    torch's optimisers import torch's compiler at the first step. The import takes longer than a round
    on a small model, and on real devices every message starts a new process.

    Parameters
    ----------
    parameters : Sequence[nn.Parameter]
    lr : float
        η.
    momentum, weight_decay : float
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters = tuple(parameters)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.state: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def step_one(self, parameter: nn.Parameter) -> None:
        """Move one parameter by its gradient, if it has one.

        A step on all parameters is a step on each. So training can make it as soon as backward has the
        gradient of one parameter, and free the gradient.
        """
        change = parameter.grad
        if change is None:
            return
        if self.weight_decay:
            change = change.add(parameter, alpha=self.weight_decay)
        if self.momentum:
            before = self.state.get(parameter)
            # Before the first step there is no momentum yet.
            change = change.clone() if before is None else before.mul_(self.momentum).add_(change)
            self.state[parameter] = change
        parameter.add_(change, alpha=-self.lr)

    def step(self) -> None:
        """Move the parameters that have a gradient."""
        for parameter in self.parameters:
            self.step_one(parameter)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        for parameter in self.parameters:
            parameter.grad = None


class Clipped:
    """A local optimiser whose gradient is scaled down before each step if its norm exceeds a bound.

    Parameters
    ----------
    optimizer : LocalOptimizer
    parameters : Sequence[nn.Parameter]
        All trained parameters; the norm is that of their gradients together.
    bound : float
    """

    def __init__(
        self, optimizer: LocalOptimizer, parameters: Sequence[nn.Parameter], bound: float
    ) -> None:
        self.optimizer, self.parameters, self.bound = optimizer, parameters, bound

    @property
    def state(self) -> object:
        """The state of the optimiser."""
        return getattr(self.optimizer, "state", {})

    def step(self) -> None:
        """Clip the gradients and move the parameters."""
        nn.utils.clip_grad_norm_(self.parameters, self.bound)
        self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none)


class InPart:
    """A local optimiser that leaves parts of its parameters as they are.

    Parameters
    ----------
    optimizer : LocalOptimizer
    frozen : Sequence[tuple[nn.Parameter, Index]]
        Parameters, each with the index of what stays as it is now.
    """

    def __init__(
        self, optimizer: LocalOptimizer, frozen: Sequence[tuple[nn.Parameter, Index]]
    ) -> None:
        self.optimizer = optimizer
        self._frozen = [(p, index, p.detach()[index].clone()) for p, index in frozen]

    @property
    def state(self) -> object:
        """The state of the optimiser."""
        return getattr(self.optimizer, "state", {})

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters, without the gradients of the frozen parts."""
        for parameter, index, _ in self._frozen:
            if parameter.grad is not None:
                parameter.grad[index] = 0
        self.optimizer.step()
        for parameter, index, value in self._frozen:
            parameter[index] = value  # against weight decay

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none)
