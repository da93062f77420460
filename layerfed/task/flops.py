"""FLOPs as torch counts them, at no cost after the first step of a kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from layerfed.task.base import Batch

__all__ = ["counted"]

T = TypeVar("T")

# The FLOPs of a step depend on what is selected and on the batch's shapes only, and counting doubles the
# time of a step, so each combination is counted once and remembered as long as its model lives.
_KNOWN: WeakKeyDictionary[nn.Module, dict[object, float]] = WeakKeyDictionary()


def counted(model: nn.Module, kind: object, batch: Batch, step: Callable[[], T]) -> tuple[T, float]:
    """Run a step and return its result and its FLOPs, forward and backward together.

    Parameters
    ----------
    model : nn.Module
    kind : object
        Hashable; steps of one kind on batches of one shape cost the same.
    batch : Batch
    step : Callable[[], T]
    """
    known = _KNOWN.setdefault(model, {})
    key = (kind, tuple((name, tuple(tensor.shape)) for name, tensor in batch.items()))
    if key in known:
        return step(), known[key]
    with FlopCounterMode(display=False) as counter:
        result = step()
    known[key] = float(counter.get_total_flops())
    return result, known[key]
