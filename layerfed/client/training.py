"""Local training of selected layers (eqs. 2-4), and evaluation.

Frozen layers stay exactly as they are: they have no gradient, no dropout, and no drift of BatchNorm's
statistics. Below the lowest selected block no input requires a gradient. So autograd keeps nothing
there, and backward ends at that block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from layerfed.client.flops import counted
from layerfed.client.local_sgd import LocalOptimizer
from layerfed.client.resident import ResidentModel
from layerfed.models.layers import LayerMap
from layerfed.task.base import Batch

__all__ = [
    "LossFn",
    "OptimizerFn",
    "TrainResult",
    "autocast",
    "evaluate",
    "selected_layers",
    "train_layers",
    "train_update",
]

LossFn = Callable[[nn.Module, Batch], Tensor]


OptimizerFn = Callable[[list[nn.Parameter]], LocalOptimizer]


@dataclass(frozen=True)
class TrainResult:
    """Mean loss over the steps, number of steps, and FLOPs of forward and backward together."""

    loss: float
    steps: int
    flops: float

    @classmethod
    def together(cls, results: Sequence[TrainResult]) -> TrainResult:
        """Return the combined result of several stretches of training."""
        steps = sum(result.steps for result in results)
        loss = sum(result.loss * result.steps for result in results) / steps
        return cls(loss, steps, sum(result.flops for result in results))


@contextmanager
def selected_layers(model: nn.Module, layers: LayerMap, names: Iterable[str]) -> Iterator[None]:
    """Make some layers trainable and freeze all others within the context.

    Parameters
    ----------
    model : nn.Module
    layers : LayerMap
    names : Iterable[str]
        Names of the layers to train.
    """
    chosen = set(names)
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    model.eval()
    for layer in layers.layers:
        for name in layer.parameters:
            parameters[name].requires_grad_(layer.name in chosen)
            parameters[name].grad = None
        for name in layer.modules:
            modules[name].train(layer.name in chosen)
    try:
        yield
    finally:
        model.eval()
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context for mixed precision; weights and updates stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def train_layers(
    model: nn.Module,
    layers: LayerMap,
    mask: Sequence[bool],
    batches: Iterable[Batch],
    loss: LossFn,
    optimizer: OptimizerFn,
    *,
    precision: str = "float32",
) -> TrainResult:
    """Train the selected blocks and the head in place, with one optimiser step for each batch.

    Parameters
    ----------
    model : nn.Module
    layers : LayerMap
    mask : Sequence[bool]
        m_i, length L.
    batches : Iterable[Batch]
        One optimiser step is made on each. The caller must cut an endless iterable.
    loss : LossFn
        Returns the mean loss of a batch.
    optimizer : OptimizerFn
        Builds the optimiser from the parameters to train. It is new in every round, as in local SGD.
    precision : {"float32", "bfloat16"}

    Raises
    ------
    ValueError
        If there is no batch, or the loss is not finite. In the second case the weights are unusable.
    """
    chosen = layers.trained(mask)
    parameters = dict(model.named_parameters())
    trained = [parameters[name] for layer in chosen for name in layers[layer].parameters]
    device = next(iter(parameters.values())).device
    losses: list[Tensor] = []
    flops = 0.0
    with selected_layers(model, layers, chosen):
        step_optimizer = optimizer(trained)

        def step(batch: Batch) -> Tensor:
            with autocast(device, precision):
                value = loss(model, batch)
            value.backward()  # type: ignore[no-untyped-call]
            # The order that local SGD needs: gradients are used first and cleared afterwards.
            step_optimizer.step()
            step_optimizer.zero_grad(set_to_none=True)
            return value.detach()

        for batch in batches:
            value, cost = counted(model, ("train", tuple(mask)), batch, partial(step, batch))
            losses.append(value)
            flops += cost
    if not losses:
        raise ValueError("there is no batch to train on")
    mean = float(torch.stack(losses).mean())
    if not torch.isfinite(torch.tensor(mean)):
        raise ValueError(f"the training loss is {mean}; lower train.lr")
    return TrainResult(mean, len(losses), flops)


def train_update(
    resident: ResidentModel,
    mask: Sequence[bool],
    batches: Iterable[Batch],
    loss: LossFn,
    optimizer: OptimizerFn,
    *,
    precision: str = "float32",
    schedule: Sequence[tuple[Sequence[bool], int]] = (),
) -> tuple[dict[str, np.ndarray], TrainResult]:
    """Train like `train_layers` and return Δ_i (eq. 4) of the trained layers' tensors, by name.

    A schedule is a list of masks with a number of steps for each. They are trained one after the other,
    each with a new optimiser, and `mask` is their union. The last mask gets all remaining batches.

    The resident model is back at θ^t afterwards, also if training raises.
    """
    stream = iter(batches)
    with resident.borrowed(resident.layers.trained(mask)) as before:
        result = TrainResult.together(
            [
                train_layers(
                    resident.model,
                    resident.layers,
                    part,
                    islice(stream, steps),
                    loss,
                    optimizer,
                    precision=precision,
                )
                for part, steps in [*schedule[:-1], (schedule[-1][0] if schedule else mask, None)]
            ]
        )
        # In place, since the trained tensors are copies that are not needed any more.
        update = {
            name: resident.tensors[name].detach().sub_(start).cpu().numpy()
            for name, start in before.items()
        }
    return update, result


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    logits: Callable[[nn.Module, Batch], Tensor],
) -> tuple[float, float]:
    """Return accuracy in [0, 1] and mean cross-entropy over all batches."""
    model.eval()
    hits, total, loss = 0, 0, 0.0
    for batch in batches:
        scores, labels = logits(model, batch).float(), batch["label"]
        hits += int((scores.argmax(1) == labels).sum())
        loss += float(nn.functional.cross_entropy(scores, labels, reduction="sum"))
        total += len(labels)
    if not total:
        raise ValueError("there is nothing to evaluate on")
    return hits / total, loss / total
