"""Blocks that a forward pass skips: a client then trains a shallower network.

A residual block adds to its input, so without it the input goes on. Neither arithmetic nor memory is
spent on a skipped block, in forward and backward, which no mask on training alone can save. DropPEFT
[arXiv 2503.10217] and FedRA [arXiv 2311.11227] are built on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from layerfed.models.layers import LayerMap

__all__ = ["now_skipped", "skipped", "with_forward"]

_NOW: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()


def now_skipped(model: nn.Module) -> tuple[str, ...]:
    """Return the blocks that a model skips now."""
    return _NOW.get(model, ())


@contextmanager
def skipped(model: nn.Module, layers: LayerMap, runs: Sequence[bool] | None) -> Iterator[None]:
    """Skip the blocks that do not run, within the context.

    Parameters
    ----------
    model : nn.Module
    layers : LayerMap
    runs : Sequence[bool] | None
        For each block whether it runs; None lets all run.

    Raises
    ------
    ValueError
        If a block cannot be skipped.
    """
    names = [b.name for b, on in zip(layers.blocks, runs or (), strict=runs is not None) if not on]
    if fixed := [name for name in names if name not in layers.skippable]:
        raise ValueError(f"the server asks to skip {fixed[0]}, which this model cannot do without")
    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(layers.skippable[name])
            stack.enter_context(with_forward(module, _pass_on))
        _NOW[model] = tuple(names)
        stack.callback(_NOW.pop, model)
        yield


def _pass_on(*args: Any, **named: Any) -> Any:
    """Return the first tensor among the arguments, by whatever name."""
    return next(value for value in (*args, *named.values()) if isinstance(value, Tensor))


@contextmanager
def with_forward(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """Let a module compute something else within the context."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
