"""The memory of a training step, predicted without weights and before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from layerfed.client.memory import Phases, as_predicted, weights_in_training
from layerfed.client.training import LossFn, OptimizerFn, Step, Stepper, recomputed, selected_layers
from layerfed.models.layers import LayerMap
from layerfed.models.trace import OnesOnMeta
from layerfed.task.base import Batch

__all__ = ["masks_named", "predicted_step"]


def predicted_step(
    model: nn.Module,
    layers: LayerMap,
    mask: Sequence[bool],
    batch: Batch,
    loss: LossFn,
    optimizer: OptimizerFn,
    *,
    how: Step,
    storage: str,
) -> Phases:
    """Run a step on torch's `meta` device, where it takes no memory, and count what it would take.

    Parameters
    ----------
    model : nn.Module
        In float32, on `meta`.
    layers : LayerMap
    mask : Sequence[bool]
    batch : Batch
        On `meta`. Its shapes are those of the largest batch.
    loss : LossFn
    optimizer : OptimizerFn
    how : Step
        Mixed precision is predicted as float32, which takes more.
    storage : {"float32", "bfloat16", "float16", "int8", "4bit"}
    """
    chosen = layers.trained(mask)
    with as_predicted(model, layers, chosen, storage), selected_layers(model, layers, chosen):
        parameters = dict(model.named_parameters())
        trained = [parameters[name] for layer in chosen for name in layers[layer].trained]
        plain = Step("float32", how.micro_batch, how.checkpointing)
        step = Stepper(model, trained, loss, optimizer, plain)
        weights = weights_in_training(model, layers, chosen)
        with torch.device("meta"), OnesOnMeta():  # type: ignore[no-untyped-call]
            if not how.checkpointing:
                return step.measured(batch, weights)[1]
            with recomputed(model, layers, chosen):
                return step.measured(batch, weights)[1]


def masks_named(num_blocks: int) -> Mapping[str, list[bool]]:
    """Return the masks that show what memory depends on: where the lowest trained block is."""
    one = {"top": num_blocks - 1, "middle": num_blocks // 2, "bottom": 0}
    found = {"head only": [False] * num_blocks}
    found |= {name: [i == block for i in range(num_blocks)] for name, block in one.items()}
    return {**found, "all": [True] * num_blocks}
