"""The loss that a client trains and probes: the task's, with class weights and label smoothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerfed.client.training import LossFn
from layerfed.config import ConfigError
from layerfed.task import Batch, Examples, Task
from layerfed.task.scoring import IGNORED, SingleLabel

__all__ = ["balanced", "objective"]


def objective(task: Task, model: nn.Module, examples: Examples) -> LossFn:
    """Return a client's training loss, which is the task's own unless the run changes it.

    Parameters
    ----------
    task : Task
        With `train.class-weights` and `train.label-smoothing` in its configuration.
    model : nn.Module
        Tells the number of classes.
    examples : Examples
        The client's examples, whose labels `train.class-weights = "balanced"` counts.

    Raises
    ------
    ConfigError
        If the task's loss is not the cross-entropy of one class an example, or the number of weights is
        not that of the classes.
    """
    train = task.config.train
    smoothing = train.label_smoothing
    if not (smoothing or train.class_weights):
        return _own(task)
    if type(task).loss is not Task.loss or task.kind.loss is not SingleLabel.loss:
        key = "class-weights" if train.class_weights else "label-smoothing"
        raise ConfigError(
            f"train.{key} = {train.class_weights or smoothing} has no use for task.name = "
            f"'{task.config.task.name}', whose loss is another one than "
            "the cross-entropy of one class for each example"
        )
    if smoothing and not task.smooths:
        raise ConfigError(
            f"train.label-smoothing = {smoothing} has no use for task.name = '{task.config.task.name}': "
            "some of its classes are no choice in some examples; set it to 0"
        )
    device = next(model.parameters()).device
    weights: Tensor | None = None
    if train.class_weights:
        model.eval()  # what is measured here must not move BatchNorm's statistics
        with torch.no_grad():
            one = next(iter(examples.in_order(1, device)))
            classes = task.logits(model, one).shape[1]
        given = train.weights or balanced(_labels(task, examples), classes)
        if len(given) != classes:
            raise ConfigError(
                f"train.class-weights = '{train.class_weights}' has {len(given)} numbers, and the task "
                f"has {classes} classes"
            )
        weights = torch.tensor(given, device=device)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        scores = task.logits(model, batch).float()
        return nn.functional.cross_entropy(
            scores, task.targets(batch), weight=weights, label_smoothing=smoothing
        )

    if weights is None:
        return _described(loss, task)
    return _described(loss, task, lambda b: float(weights[task.targets(b).long()].sum()))


def _labels(task: Task, examples: Examples) -> np.ndarray:
    if type(task).targets is Task.targets:
        return examples.column("label")
    cpu = torch.device("cpu")
    found = [task.targets(batch).numpy() for batch in examples.in_order(256, cpu)]
    return np.concatenate(found)


def _own(task: Task) -> LossFn:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return task.loss(model, batch)

    return _described(loss, task)


def _described(loss: Any, task: Task, terms: Callable[[Batch], float] | None = None) -> LossFn:
    """Tell of a loss what its mean is over, for batches that go through the model in parts."""
    loss.terms = terms or partial(_terms, task)
    loss.counts = partial(_counts, task)
    described: LossFn = loss
    return described


def _terms(task: Task, batch: Batch) -> float:
    """Return the number of targets that count: of numbers the rows, of classes those not ignored."""
    targets = task.targets(batch)
    if targets.is_floating_point():
        return float(len(targets))
    return float((targets != IGNORED).sum()) / max(1, targets[0].numel())


def _counts(task: Task, batch: Batch) -> bool:
    """Return whether any target counts; only to look at tags of tokens waits for the device."""
    targets = task.targets(batch)
    return targets.is_floating_point() or targets.dim() < 2 or bool((targets != IGNORED).any())


def balanced(labels: np.ndarray, classes: int) -> Sequence[float]:
    """Return n / (k n_c) for each class: equal total weight for the k classes that occur.

    A class without examples has the weight 1. Label smoothing alone then gives it a gradient.
    """
    counts = np.bincount(labels, minlength=classes)
    present = counts > 0
    weights = np.ones(classes)
    weights[present] = len(labels) / (present.sum() * counts[present])
    return weights.tolist()
