"""Measurement of the cost of training a layer on this device: FLOPs, seconds or memory of a step.

Backward runs from the loss down to the lowest trained layer, so a layer costs more than its own share:
all layers above it pass the gradient down. A step over the layers m costs

    S(m) = S(∅) + Σ_l c_l m(l) + D_low(m)

where S(∅) is a step on the head alone, c_l is the cost that layer l adds by itself, and D_l is the cost
of carrying the gradient down to layer l. D_l does not increase with l. Both come from 2L measured steps:

    c_l = S({0, l}) − S({0})  for l > 0,        D_l = S({l}) − S(∅) − c_l.

Layer 0 is selected only together with D_0, so only their sum matters, and c_0 is set to the median of
the others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from layerfed.client.devices import autocast, synchronize
from layerfed.client.flops import TotalFlops
from layerfed.client.memory import LiveBytes
from layerfed.client.training import LossFn, Step, recomputed, selected_layers
from layerfed.models.layers import LayerMap
from layerfed.models.stored import Stored
from layerfed.task.base import Batch

__all__ = ["MEASURED_UNITS", "MeasuredUnit", "measure_costs", "step_cost"]

MeasuredUnit = Literal["flops", "seconds", "memory"]
MEASURED_UNITS: tuple[MeasuredUnit, ...] = ("flops", "seconds", "memory")

FLOAT32 = Step()
# The number of timings whose median is taken, after one that is not counted.
TIMED = 5
# The least cost of a layer, as a share of the largest difference that was measured.
LEAST = 1e-3


def measure_costs(
    model: nn.Module,
    layers: LayerMap,
    batch: Batch,
    loss: LossFn,
    unit: MeasuredUnit,
    *,
    how: Step = FLOAT32,
) -> tuple[np.ndarray, np.ndarray]:
    """Measure c_l and D_l of every block, on the model's device.

    Parameters
    ----------
    model : nn.Module
        The model, which is the same afterwards. The steps are those of training: trained layers are in
        training mode, since dropout takes memory of its own.
    layers : LayerMap
    batch : Batch
        A batch of the size used in training.
    loss : LossFn
    unit : {"flops", "seconds", "memory"}
        FLOPs or seconds of forward and backward, or the bytes kept for backward and gradients (on CUDA,
        the rise of the allocator's peak).
    how : Step

    Returns
    -------
    tuple[numpy.ndarray, numpy.ndarray]
        c and D, shape (L,) each, non-negative, D non-increasing.
    """
    names = [block.name for block in layers.blocks]

    def cost(*selected: int) -> float:
        chosen = [names[i] for i in selected]
        return step_cost(model, layers, chosen, batch, loss, unit, how=how)

    nothing = cost()
    alone = np.array([cost(i) for i in range(len(names))]) - nothing
    with_first = np.array([cost(0, i) for i in range(1, len(names))]) - nothing
    return _split(alone, with_first)


def step_cost(
    model: nn.Module,
    layers: LayerMap,
    blocks: Iterable[str],
    batch: Batch,
    loss: LossFn,
    unit: MeasuredUnit,
    *,
    how: Step = FLOAT32,
) -> float:
    """Measure S(m), the cost of one step on some blocks and the head.

    Parameters are those of `measure_costs`.
    """
    device, chosen = next(model.parameters()).device, [*blocks, "head"]
    parts = how.parts(batch, loss)

    def step(parts: Sequence[tuple[Batch, float | None]] = parts) -> None:
        for part, share in parts:
            with autocast(device, how.precision):
                value = loss(model, part)
            (value if share is None else value * share).backward()  # type: ignore[no-untyped-call]

    with ExitStack() as stack:
        stack.enter_context(selected_layers(model, layers, chosen))
        stack.enter_context(_kept_state(model, device))
        if how.checkpointing:
            stack.enter_context(recomputed(model, layers, chosen))
        if unit == "flops":
            return _flops(model, step)
        if unit == "seconds":
            return _seconds(model, step)
        if device.type == "cuda":
            return _cuda_memory(model, step)
        first = partial(step, parts[:1])  # the largest
        if how.checkpointing:  # what is computed again lives for a while only
            with LiveBytes((*model.parameters(), *model.buffers(), *batch.values())) as live:
                first()
            _clear(model)
            return float(live.phases(0.0).peak)
        return _memory(model, first)


@contextmanager
def _kept_state(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put back what steps in training mode move: BatchNorm's statistics, and the random generators."""
    buffers = [
        (buffer, buffer.clone())
        for module in model.modules()
        if module.training
        for buffer in module.buffers(recurse=False)
    ]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _split(alone: np.ndarray, with_first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solve for c and D from S({l}) − S(∅), shape (L,), and S({0, l}) − S(∅), shape (L-1,)."""
    if len(alone) == 1:
        return np.maximum(alone, 0.0), np.zeros(1)
    others = np.maximum(with_first - alone[0], 0.0)
    # A layer is never free, whatever the noise: a cost of zero would pass every limit.
    others = np.maximum(others, LEAST * max(float(np.abs(alone).max()), others.max()))
    first = min(float(np.median(others)), max(float(alone[0]), float(others.min())))
    own = np.array([first, *others])
    # Timings are noisy, but carrying the gradient further down never becomes cheaper.
    depth = np.maximum.accumulate(np.maximum(alone - own, 0.0)[::-1])[::-1]
    return own, depth.copy()


def _clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _flops(model: nn.Module, step: Callable[[], None]) -> float:
    with TotalFlops() as flops:
        step()
    _clear(model)
    return float(flops.total)


def _seconds(model: nn.Module, step: Callable[[], None]) -> float:
    device = next(model.parameters()).device
    times = []
    for _ in range(TIMED + 1):
        _clear(model)
        synchronize(device)
        began = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - began)
    _clear(model)
    return statistics.median(times[1:])


def _cuda_memory(model: nn.Module, step: Callable[[], None]) -> float:
    device = next(model.parameters()).device
    step()  # libraries take their workspaces in the first step, and keep them
    _clear(model)
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    synchronize(device)
    peak = float(torch.cuda.max_memory_allocated(device) - before)
    _clear(model)
    return peak


def _memory(model: nn.Module, step: Callable[[], None]) -> float:
    with _kept_for_backward(model.parameters()) as kept:
        step()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    _clear(model)
    return float(sum(kept.values()) + gradients)


@contextmanager
def _kept_for_backward(parameters: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Collect the storages that autograd keeps, without weights, as {storage: bytes}."""
    weights = {p.untyped_storage()._cdata for p in parameters if not isinstance(p, Stored)}
    kept: dict[int, int] = {}
    # The tensors are held so that no storage is another one later.
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if isinstance(tensor, Stored):  # a weight, which has no storage of its own
            return tensor
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
