"""The probe: statistics of each layer's gradient at θ^t, without ever holding a whole gradient.

As soon as backward has the gradients of one block, they are reduced to one number for each statistic and
freed (`client/passes.py`). So the probe's memory is one block's gradients and the activations, and no
gradient is left for the next batch or the next client. A statistic of several passes may take more; its
docstring states what it takes.

A probe may be of some blocks only. Backward then ends at the lowest of them, and computes no gradient of
the weights of others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import repeat

import numpy as np
import torch
from torch import Tensor, nn

from layerfed.client.devices import wide
from layerfed.client.passes import Passes
from layerfed.client.prefix import PrefixCache
from layerfed.client.statistics import STATISTICS, Statistic, load_statistic
from layerfed.client.training import LossFn, counting, recomputed, selected_layers
from layerfed.models.layers import LayerMap
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
    lr: float = 0.01,
    checkpointing: bool = False,
    blocks: Sequence[bool] | None = None,
    cache: PrefixCache | None = None,
) -> tuple[dict[str, list[float]], float]:
    """Compute statistics of every block's gradient, each averaged over the batches.

    Parameters
    ----------
    model : nn.Module
        At θ^t; unchanged afterwards.
    layers : LayerMap
    batches : Iterable[Batch]
        Each in which a target counts gives one stochastic gradient g_{i,l}.
    loss : LossFn
    statistics : Iterable[str]
        Their names; see `layerfed.client.statistics`.
    precision : {"float32", "bfloat16"}
    lr : float
        η, for statistics of what a step of SGD gains.
    checkpointing : bool
        Whether activations inside blocks are computed again in backward, and not kept.
    blocks : Sequence[bool], optional
        The blocks that are measured, of length L; by default all.
    cache : PrefixCache, optional
        Keeps the outputs of the blocks that are not measured and never changed. It is of the same model.

    Returns
    -------
    tuple[dict[str, list[float]], float]
        {statistic: one number for each measured block, in their order}, and the FLOPs spent.

    Raises
    ------
    ValueError
        If there is no such batch or a statistic is unknown.
    """
    wanted = {name: load_statistic(name) for name in statistics}
    of_data = {name: s for name, s in wanted.items() if not s.public}
    single = [s for s in of_data.values() if not s.passes]
    rows: list[np.ndarray] = []
    total_flops = 0.0
    chosen = [b for b, on in zip(layers.blocks, blocks or repeat(True), strict=False) if on]
    names = [block.name for block in chosen]
    # Every round probes the model as it is then: what changed is not met a second time.
    low = min(layers.blocks.index(chosen[0]), cache.resident.lowest_changed) if cache else 0
    prefix = cache and cache.below(low, precision)
    resumed = prefix.resuming(loss) if prefix else loss
    with selected_layers(model, layers, names), ExitStack() as stack:
        model.eval()  # θ^t itself is probed: no dropout, no drift of BatchNorm's statistics
        if checkpointing:
            stack.enter_context(recomputed(model, layers, names))
        for batch in counting(batches, loss):
            if prefix:
                batch = prefix.joined(model, batch, loss)
            passes = Passes(model, chosen, batch, resumed, precision, lr, low)
            columns = iter(_single(passes, single).T if single else ())
            table = [s.measure(passes) if s.passes else next(columns) for s in of_data.values()]
            rows.append(np.array([column.cpu().double().numpy() for column in table]))
            total_flops += passes.flops
    if not rows:
        raise ValueError("there is no batch to probe on in which a target counts")
    found = dict(zip(of_data, np.mean(rows, axis=0).tolist(), strict=True))
    for name, statistic in wanted.items():
        if statistic.public:
            parameters = dict(model.named_parameters())
            own = ([parameters[p].detach() for p in block.parameters] for block in chosen)
            found[name] = [float(statistic([], weights)) for weights in own]
    return {name: found[name] for name in wanted}, total_flops + (prefix.flops if prefix else 0.0)


def _single(passes: Passes, statistics: Sequence[Statistic]) -> Tensor:
    """Return the statistics of one backward pass, a row for each measured block."""
    # It is on the device, so that the pass waits for nothing.
    shape, device = (len(passes.weights), len(statistics)), passes.device
    table = torch.zeros(shape, dtype=wide(device), device=device)

    def measure(row: int, gradients: Sequence[Tensor]) -> None:
        for column, statistic in enumerate(statistics):
            table[row, column] = statistic(gradients, passes.weights[row])

    passes.backward(measure)
    return table
