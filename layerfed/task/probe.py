"""The probe: statistics of each layer's gradient at θ^t, without ever holding a whole gradient.

A hook reduces each parameter's gradient to two numbers and frees it as soon as backward has produced
it, so the probe's memory is one parameter's gradient beside the activations, and no gradient is left
for the next batch or the next client to stumble over.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from layerfed.layers import LayerMap
from layerfed.task.base import Batch
from layerfed.task.flops import counted
from layerfed.task.training import LossFn, autocast, selected_layers

__all__ = ["STATISTICS", "probe_layers"]

STATISTICS = ("grad_norm_sq", "param_norm_sq", "snr")

# E[g²] − E[g]² of float32 sums is known to this share of E[g²]; a variance below it is none.
ROUNDING = 1e-6


def probe_layers(
    model: nn.Module,
    layers: LayerMap,
    batches: Iterable[Batch],
    loss: LossFn,
    statistics: Iterable[str] = STATISTICS,
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
        Of `grad_norm_sq`, ‖g_{i,l}‖² summed over the layer's tensors (P1); `param_norm_sq`, ‖θ_l‖²;
        `snr`, |mean(g)| / var(g) over all elements of the layer's gradient, 0 where that has no
        variance [S].
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
    wanted = tuple(statistics)
    if unknown := [name for name in wanted if name not in STATISTICS]:
        raise ValueError(f"unknown statistic {unknown[0]!r}; known: {', '.join(STATISTICS)}")
    parameters = dict(model.named_parameters())
    names = [name for block in layers.blocks for name in block.parameters]
    device = next(iter(parameters.values())).device
    # Row: one parameter's ‖g‖² and Σ g. On the device, so that hooks do not wait for it.
    sums = torch.zeros(len(names), 2, dtype=torch.float32, device=device)

    def reduce(row: int) -> object:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            sums[row, 0] = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
            sums[row, 1] = parameter.grad.sum(dtype=torch.float32)
            parameter.grad = None

        return parameters[names[row]].register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    rows: list[dict[str, np.ndarray]] = []
    total_flops = 0.0
    model.eval()
    with selected_layers(model, layers, [block.name for block in layers.blocks]):
        model.eval()  # θ^t itself is probed: no dropout, no drift of BatchNorm's statistics
        handles = [reduce(row) for row in range(len(names))]
        try:
            for batch in batches:
                sums.zero_()
                backward = partial(_backward, model, batch, loss, device, precision)
                total_flops += counted(model, "probe", batch, backward)[1]
                rows.append(_per_block(sums.double().cpu().numpy(), parameters, names, layers))
        finally:
            for handle in handles:
                handle.remove()  # type: ignore[attr-defined]
    if not rows:
        raise ValueError("there is no batch to probe on")
    means = {name: np.mean([row[name] for row in rows], axis=0) for name in ("grad_norm_sq", "snr")}
    norms = [
        sum(float(parameters[n].detach().double().square().sum()) for n in block.parameters)
        for block in layers.blocks
    ]
    found = {"grad_norm_sq": means["grad_norm_sq"], "param_norm_sq": norms, "snr": means["snr"]}
    return {name: [float(x) for x in found[name]] for name in wanted}, total_flops


def _backward(
    model: nn.Module, batch: Batch, loss: LossFn, device: torch.device, precision: str
) -> None:
    with autocast(device, precision):
        value = loss(model, batch)
    value.backward()  # type: ignore[no-untyped-call]


def _per_block(
    sums: np.ndarray, parameters: dict[str, nn.Parameter], names: list[str], layers: LayerMap
) -> dict[str, np.ndarray]:
    """Reduce per-parameter sums (P, 2) to per-block statistics (L,)."""
    row_of = {name: row for row, name in enumerate(names)}
    norm_sq, snr = [], []
    for block in layers.blocks:
        squares, total = sums[[row_of[name] for name in block.parameters]].sum(axis=0)
        count = sum(parameters[name].numel() for name in block.parameters)
        mean = total / count
        variance = squares / count - mean**2
        varies = variance > ROUNDING * squares / count
        norm_sq.append(squares)
        snr.append(abs(mean) / variance if varies else 0.0)
    return {"grad_norm_sq": np.array(norm_sq), "snr": np.array(snr)}
