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

from layerfed.client.flops import counted
from layerfed.client.training import LossFn, autocast, selected_layers
from layerfed.models.layers import LayerMap
from layerfed.task.base import Batch

__all__ = ["STATISTICS", "probe_layers"]

STATISTICS = ("grad_norm_sq", "param_norm_sq", "snr", "snr_code")

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
        `snr`, |mean(g)| / var(g) over all elements of the layer's gradient [S]; `snr_code`, mean(g)² /
        std(g) of each tensor, summed over the layer [C]. What has no variance adds 0 to either.
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
    norms = [
        sum(float(parameters[n].detach().double().square().sum()) for n in block.parameters)
        for block in layers.blocks
    ]
    found = {name: np.mean([row[name] for row in rows], axis=0) for name in rows[0]}
    found["param_norm_sq"] = np.array(norms)
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
    norm_sq, snr, snr_code = [], [], []
    for block in layers.blocks:
        of_tensors = sums[[row_of[name] for name in block.parameters]]
        counts = np.array([parameters[name].numel() for name in block.parameters])
        squares, total = of_tensors.sum(axis=0)
        mean, variance = _moments(squares, total, counts.sum())
        norm_sq.append(squares)
        snr.append(abs(mean) / variance if variance > 0 else 0.0)
        ratios = 0.0
        for (square, part), count in zip(of_tensors, counts, strict=True):
            mean, variance = _moments(square, part, count)
            if variance > 0:
                # torch.std, as the released code has it, divides by the number of elements less one.
                ratios += mean**2 / np.sqrt(variance * count / (count - 1))
        snr_code.append(ratios)
    found = {"grad_norm_sq": norm_sq, "snr": snr, "snr_code": snr_code}
    return {name: np.array(row) for name, row in found.items()}


def _moments(squares: float, total: float, count: int) -> tuple[float, float]:
    """Return mean and variance of elements from their sums; 0 for a variance that is only rounding."""
    mean, square = total / count, squares / count
    variance = square - mean**2
    return mean, variance if variance > ROUNDING * square else 0.0
