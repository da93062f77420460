"""A client's time in a round: backward reaches the output's layers first, and what is done is sent.

Stragglers of SALF [Lang, Cohen and Shlezinger, arXiv 2403.18375] send the layers that backward has
reached, and each layer of the model is averaged over the clients that sent it. SALF makes one step a
round. With several, a client that runs out of time in its first step sends the layers that it has
finished. Later it sends all its layers: those that it finished in the step that was cut are one step
ahead of the others, and no work is thrown away.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from layerfed.client.devices import synchronize
from layerfed.client.flops import TotalFlops

__all__ = ["Clock", "OutOfTime", "Progress"]


class OutOfTime(Exception):
    """Raised in backward, when the next layer is not to be trained any more."""


class Clock:
    """The time since training began; a context in which it runs.

    Parameters
    ----------
    deadline : float
        Seconds.
    device : torch.device
        Real time waits for the work that it was given.
    speed : float
        FLOPs a second of a simulated client, whose clock is the number of FLOPs so far; 0: real time.
    """

    def __init__(self, deadline: float, device: torch.device, speed: float = 0.0) -> None:
        self.deadline, self.device, self.speed = deadline, device, speed
        self._count = TotalFlops()
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        """Count FLOPs, if they are the clock."""
        if self.speed:
            self._count.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """Count no more."""
        if self.speed:
            self._count.__exit__(*error)  # type: ignore[no-untyped-call]

    @property
    def flops(self) -> float:
        """The FLOPs of a simulated client so far; 0 in real time."""
        return self._count.total

    @property
    def over(self) -> bool:
        """Whether the deadline has passed."""
        if self.speed:
            return self.flops / self.speed >= self.deadline
        synchronize(self.device)
        return time.monotonic() - self._began >= self.deadline


class Progress:
    """The layers that backward has reached in a step.

    A layer that is reached in time is finished, since backward goes from layer to layer. When it comes
    to another layer, the one before has all its gradients.

    Parameters
    ----------
    clock : Clock
    layer_of : Mapping[Tensor, str]
        The layer of each trained parameter.
    """

    def __init__(self, clock: Clock, layer_of: Mapping[Tensor, str]) -> None:
        self.clock, self._layer_of = clock, layer_of
        self.finished: list[str] = []

    def reached(self, parameter: Tensor, *, last: bool) -> None:
        """Note that a gradient is there; `last` says that it is whole, and no part of a batch is left.

        Raises
        ------
        OutOfTime
            If it is a layer's first one, and the deadline has passed.
        """
        layer = self._layer_of[parameter]
        if layer in self.finished:
            return
        if self.clock.over:
            raise OutOfTime
        if last:
            self.finished.append(layer)

    def has_finished(self, parameter: Tensor) -> bool:
        """Return whether a parameter's layer is finished."""
        return self._layer_of[parameter] in self.finished
