"""Passes over one batch of a probe, without ever holding a whole gradient.

As soon as backward has the gradients of one block, they are given to a visitor and freed. So a pass
takes the memory of one block's gradients and of the activations, and leaves no gradient behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from layerfed.client.devices import autocast
from layerfed.client.flops import counted
from layerfed.client.training import LossFn
from layerfed.models.layers import Layer
from layerfed.models.stored import decoded, owners, put
from layerfed.task.base import Batch

__all__ = ["Passes", "Visitor"]

Visitor = Callable[[int, Sequence[Tensor]], None]
"""Takes the index of a measured block and the gradients of its parameters, which it may not change."""


class Passes:
    """Passes over one batch at θ^t.

    Parameters
    ----------
    model : nn.Module
        The blocks require gradients; unchanged afterwards.
    blocks : Sequence[Layer]
        The blocks that are measured. A visitor is called for no other.
    batch : Batch
    loss : LossFn
        Returns the mean loss of a batch.
    precision : {"float32", "bfloat16"}
    lr : float
        η, the step of one local step of SGD.
    low : int
        The block at which a pass begins, if the batch has outputs of those below.

    Attributes
    ----------
    weights : list[list[Tensor]]
        The parameters of each of these blocks, detached.
    flops : float
        The FLOPs of all passes so far.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Layer],
        batch: Batch,
        loss: LossFn,
        precision: str = "float32",
        lr: float = 0.01,
        low: int = 0,
    ) -> None:
        self.batch, self.lr, self.flops = batch, lr, 0.0
        self._model, self._loss, self._precision = model, loss, precision
        named = dict(model.named_parameters())
        self._parameters = [[named[name] for name in block.parameters] for block in blocks]
        places = owners(model)
        self._owners = [[places[name] for name in block.parameters] for block in blocks]
        self._low, self._kind = low, ("probe", low, tuple(block.name for block in blocks))
        self.weights = [[p.detach() for p in block] for block in self._parameters]
        self.device = next(iter(named.values())).device

    def examples(self) -> list[Batch]:
        """Return the batch's examples, each as a batch of one."""
        count = len(next(iter(self.batch.values())))
        return [{k: v[i : i + 1] for k, v in self.batch.items()} for i in range(count)]

    def loss(self) -> Tensor:
        """Return the batch's loss at the present weights, by a forward pass."""

        def forward() -> Tensor:
            with torch.no_grad(), autocast(self.device, self._precision):
                return self._loss(self._model, self.batch)

        return self._counted(("forward", self._low), self.batch, forward)

    def backward(self, visit: Visitor, batch: Batch | None = None) -> Tensor:
        """Give the gradients of every measured block to a visitor, and return the loss.

        Parameters
        ----------
        visit : Visitor
            Called once for each block, from the output down; a block that the loss does not depend on
            has gradients of zero.
        batch : Batch, optional
            By default the whole batch.
        """
        batch = self.batch if batch is None else batch
        waiting = [len(block) for block in self._parameters]

        @torch.no_grad()
        def measure(row: int) -> None:
            own = self._parameters[row]
            visit(row, [torch.zeros_like(p) if p.grad is None else p.grad for p in own])
            for parameter in own:
                parameter.grad = None

        def hook(row: int, _parameter: Tensor) -> None:
            waiting[row] -= 1
            if not waiting[row]:
                measure(row)

        def run() -> Tensor:
            with autocast(self.device, self._precision):
                value = self._loss(self._model, batch)
            value.backward()  # type: ignore[no-untyped-call]
            return value.detach()

        handles = [
            parameter.register_post_accumulate_grad_hook(partial(hook, row))  # type: ignore[no-untyped-call]
            for row, block in enumerate(self._parameters)
            for parameter in block
        ]
        try:
            value = self._counted(self._kind, batch, run)
        finally:
            for handle in handles:
                handle.remove()
        for row, left in enumerate(waiting):
            if left:  # the loss does not depend on all of the block
                measure(row)
        return value

    @contextmanager
    def moved(self, row: int, step: Sequence[Tensor], size: float | Tensor) -> Iterator[None]:
        """Hold a block in float32, moved by `size` times `step`, within the context."""
        before = list(self._parameters[row])
        # Not in place: frozen weights may be a mapped file, or held in half precision.
        for i, (weight, direction) in enumerate(zip(self.weights[row], step, strict=True)):
            values = decoded(weight) + direction * size
            self._put(row, i, nn.Parameter(values, before[i].requires_grad))
        try:
            yield
        finally:
            for i, old in enumerate(before):
                self._put(row, i, old)

    def _put(self, row: int, i: int, parameter: nn.Parameter) -> None:
        put(self._owners[row][i], parameter)
        self._parameters[row][i] = parameter

    def _counted(self, kind: object, batch: Batch, run: Callable[[], Tensor]) -> Tensor:
        value, flops = counted(self._model, kind, batch, run)
        self.flops += flops
        return value
