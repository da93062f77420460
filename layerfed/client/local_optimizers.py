"""Local optimisers that move one parameter at a time, and steps with clipped or partial gradients.

torch's optimisers import torch's compiler at the first step. The import takes longer than a round on a
small model, and on real devices every message starts a new process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Clipped", "InPart", "LocalAdamW", "LocalOptimizer", "LocalSGD", "moved_alone"]


Index = tuple[slice, ...]


class LocalOptimizer(Protocol):
    """The interface of a local optimiser; every optimiser of torch has it."""

    def step(self) -> object:
        """Move the parameters by their gradients."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""


class OneByOne(ABC):
    """A local optimiser whose step on all parameters is a step on each.

    So training can make it as soon as backward has the gradient of one parameter, and free the gradient.

    Parameters
    ----------
    parameters : Sequence[nn.Parameter]
    lr : float
        η.
    weight_decay : float

    Attributes
    ----------
    rates : dict[nn.Parameter, float]
        Parameters with a learning rate of their own, in place of η.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], lr: float, weight_decay: float = 0.0
    ) -> None:
        self.parameters = tuple(parameters)
        self.lr, self.weight_decay = lr, weight_decay
        self.rates: dict[nn.Parameter, float] = {}
        self.state: dict[nn.Parameter, Any] = {}

    @abstractmethod
    def _move(self, parameter: nn.Parameter, gradient: Tensor, lr: float) -> None:
        """Move one parameter by its gradient, at a learning rate."""

    @torch.no_grad()
    def step_one(self, parameter: nn.Parameter) -> None:
        """Move one parameter, if it has a gradient."""
        if parameter.grad is not None:
            self._move(parameter, parameter.grad, self.rates.get(parameter, self.lr))

    def step(self) -> None:
        """Move the parameters that have a gradient."""
        for parameter in self.parameters:
            self.step_one(parameter)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        for parameter in self.parameters:
            parameter.grad = None


class LocalSGD(OneByOne):
    """Local SGD (eq. 2) with momentum and weight decay, equal to `torch.optim.SGD` to the bit.

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
        super().__init__(parameters, lr, weight_decay)
        self.momentum = momentum

    def _move(self, parameter: nn.Parameter, gradient: Tensor, lr: float) -> None:
        change = gradient
        if self.weight_decay:
            change = change.add(parameter, alpha=self.weight_decay)
        if self.momentum:
            before = self.state.get(parameter)
            # Before the first step there is no momentum yet.
            change = change.clone() if before is None else before.mul_(self.momentum).add_(change)
            self.state[parameter] = change
        parameter.add_(change, alpha=-lr)


class LocalAdamW(OneByOne):
    """AdamW [Loshchilov and Hutter, 2019], equal to `torch.optim.AdamW` to the bit on a CPU.

    Parameters
    ----------
    parameters : Sequence[nn.Parameter]
    lr : float
        η.
    weight_decay : float
    """

    betas, eps = (0.9, 0.999), 1e-8

    def _move(self, parameter: nn.Parameter, gradient: Tensor, lr: float) -> None:
        if parameter not in self.state:
            self.state[parameter] = 0, torch.zeros_like(parameter), torch.zeros_like(parameter)
        steps, mean, square = self.state[parameter]
        steps += 1
        self.state[parameter] = steps, mean, square
        first, second = self.betas
        parameter.mul_(1 - lr * self.weight_decay)
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = (square.sqrt() / (1 - second**steps) ** 0.5).add_(self.eps)
        parameter.addcdiv_(mean, root, value=-lr / (1 - first**steps))


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

    def step(self) -> None:
        """Move the parameters, without the gradients of the frozen parts."""
        self._around(self._frozen, self.optimizer.step)

    def step_one(self, parameter: nn.Parameter) -> None:
        """Move one parameter, if it has a gradient and the optimiser can move it alone."""
        alone = moved_alone(self.optimizer)
        assert alone is not None
        own = [frozen for frozen in self._frozen if frozen[0] is parameter]
        self._around(own, partial(alone, parameter))

    @torch.no_grad()
    def _around(
        self, frozen: Sequence[tuple[nn.Parameter, Index, Tensor]], move: Callable[[], object]
    ) -> None:
        for parameter, index, _ in frozen:
            if parameter.grad is not None:
                parameter.grad[index] = 0
        move()
        for parameter, index, value in frozen:
            parameter[index] = value  # against weight decay

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none)


def moved_alone(optimizer: LocalOptimizer) -> Callable[[nn.Parameter], None] | None:
    """Return the function that moves one parameter as a step on all does; None if there is none.

    A bound on the norm of all gradients needs all of them, and so do torch's optimisers. A subclass with
    a step of its own makes it.
    """
    if type(optimizer) is InPart:
        return optimizer.step_one if moved_alone(optimizer.optimizer) else None
    if isinstance(optimizer, OneByOne) and type(optimizer).step is OneByOne.step:
        return optimizer.step_one
    return None
