"""The probe: statistics of each layer's gradient at θ^t, without ever holding a whole gradient.

As soon as backward has the gradients of one block, they are reduced to one number for each statistic and
freed. So the probe's memory is one block's gradients and the activations, and no gradient is left for
the next batch or the next client.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from layerfed.client.devices import wide
from layerfed.client.flops import counted
from layerfed.client.statistics import STATISTICS, Statistic, load_statistic
from layerfed.client.training import LossFn, autocast, selected_layers
from layerfed.models.layers import Layer, LayerMap
from layerfed.task.base import Batch

__all__ = ["probe_layers"]


def probe_layers(
    model: nn.Module,
    layers: LayerMap,
    batches: Iterable[Batch],
    loss: LossFn,
    statistics: Iterable[str] = tuple(STATISTICS),
    *,
    precision: str = "float32",
) -> tuple[dict[str, list[float]], float]:
    """Compute statistics of every block's gradient, each averaged over the batches.

    Parameters
    ----------
    model : nn.Module
        At θ^t; unchanged afterwards.
    layers : LayerMap
    batches : Iterable[Batch]
        Each gives one stochastic gradient g_{i,l}.
    loss : LossFn
    statistics : Iterable[str]
        Their names; see `layerfed.client.statistics`.
    precision : {"float32", "bfloat16"}

    Returns
    -------
    tuple[dict[str, list[float]], float]
        {statistic: L numbers, in the order of the blocks}, and the FLOPs spent.

    Raises
    ------
    ValueError
        If there is no batch or a statistic is unknown.
    """
    wanted = {name: load_statistic(name) for name in statistics}
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    # A row for each block, a column for each statistic. It is on the device, so hooks do not wait.
    of_data = {name: statistic for name, statistic in wanted.items() if not statistic.public}
    table = torch.zeros(layers.num_blocks, len(of_data), dtype=wide(device), device=device)
    rows: list[np.ndarray] = []
    total_flops = 0.0
    with selected_layers(model, layers, [block.name for block in layers.blocks]):
        model.eval()  # θ^t itself is probed: no dropout, no drift of BatchNorm's statistics
        for batch in batches:
            with _measuring(table, layers.blocks, parameters, list(of_data.values())):
                backward = partial(_backward, model, batch, loss, device, precision)
                total_flops += counted(model, "probe", batch, backward)[1]
            rows.append(table.cpu().double().numpy().copy())
    if not rows:
        raise ValueError("there is no batch to probe on")
    means = np.mean(rows, axis=0)
    found = {name: means[:, column].tolist() for column, name in enumerate(of_data)}
    for name, statistic in wanted.items():
        if statistic.public:
            own = ([parameters[p].detach() for p in block.parameters] for block in layers.blocks)
            found[name] = [float(statistic([], weights)) for weights in own]
    return {name: found[name] for name in wanted}, total_flops


@contextmanager
def _measuring(
    table: Tensor,
    blocks: Sequence[Layer],
    parameters: dict[str, nn.Parameter],
    statistics: Sequence[Statistic],
) -> Iterator[None]:
    """Fill in the table, shape (L, S), while backward runs in the context."""
    waiting = [len(block.parameters) for block in blocks]

    def measure(row: int) -> None:
        own = [parameters[name] for name in blocks[row].parameters]
        weights = [parameter.detach() for parameter in own]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
        for column, statistic in enumerate(statistics):
            table[row, column] = statistic(gradients, weights)
        for parameter in own:
            parameter.grad = None

    def hook(row: int, _parameter: Tensor) -> None:
        waiting[row] -= 1
        if not waiting[row]:
            measure(row)

    handles = [
        parameters[name].register_post_accumulate_grad_hook(partial(hook, row))  # type: ignore[no-untyped-call]
        for row, block in enumerate(blocks)
        for name in block.parameters
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for row, left in enumerate(waiting):
        if left:  # the loss does not depend on all of the block
            with torch.no_grad():
                measure(row)


def _backward(
    model: nn.Module, batch: Batch, loss: LossFn, device: torch.device, precision: str
) -> None:
    with autocast(device, precision):
        value = loss(model, batch)
    value.backward()  # type: ignore[no-untyped-call]
