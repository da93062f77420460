"""Local training of selected layers (eqs. 2-4), and evaluation.

Frozen layers stay exactly as they are: they have no gradient, no dropout, and no drift of BatchNorm's
statistics. Below the lowest selected block no input requires a gradient. So autograd keeps nothing
there, and backward ends at that block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import chain, islice
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from layerfed.client.deadline import Clock, OutOfTime, Progress
from layerfed.client.devices import autocast
from layerfed.client.flops import counted
from layerfed.client.local_optimizers import LocalOptimizer, moved_alone
from layerfed.client.memory import LiveBytes, Phases, weights_in_training
from layerfed.client.prefix import PrefixCache
from layerfed.client.resident import ResidentModel
from layerfed.client.skipping import now_skipped, with_forward
from layerfed.models.layers import LayerMap
from layerfed.task.base import Batch
from layerfed.task.scoring import IGNORED, SingleLabel, tallied

__all__ = [
    "LossFn",
    "OptimizerFn",
    "Step",
    "Stepper",
    "TrainResult",
    "evaluate",
    "recomputed",
    "selected_layers",
    "train_layers",
    "train_update",
]

LossFn = Callable[[nn.Module, Batch], Tensor]


OptimizerFn = Callable[[list[nn.Parameter]], LocalOptimizer]

# The memory of a step depends on the mask and on the batch's shapes only, as FLOPs do.
_MEASURED: WeakKeyDictionary[nn.Module, dict[object, Phases]] = WeakKeyDictionary()


@dataclass(frozen=True)
class TrainResult:
    """Mean loss over the steps, their number, FLOPs of forward and backward together, and memory.

    `layers` are the ones that moved: all trained ones, unless the client was `late` in its first step.
    In real time the FLOPs of a step that was cut are not known, and left out.

    Of the examples of all steps, `found` is the number whose prefix was kept, which saved `saved` FLOPs.
    """

    loss: float
    steps: int
    flops: float
    layers: tuple[str, ...] = ()
    late: bool = False
    memory: Phases = field(default_factory=Phases)
    found: int = 0
    examples: int = 0
    saved: float = 0.0

    @classmethod
    def together(cls, results: Sequence[TrainResult]) -> TrainResult:
        """Return the combined result of several stretches of training."""
        steps = sum(result.steps for result in results)
        loss = sum(result.loss * result.steps for result in results) / steps
        memory = reduce(Phases.most, (result.memory for result in results))
        return cls(
            loss,
            steps,
            sum(result.flops for result in results),
            tuple(dict.fromkeys(layer for result in results for layer in result.layers)),
            results[-1].late,
            memory,
            sum(result.found for result in results),
            sum(result.examples for result in results),
            sum(result.saved for result in results),
        )


@dataclass(frozen=True)
class Step:
    """How a step is computed; the result is the same to rounding.

    Attributes
    ----------
    precision : {"float32", "bfloat16"}
    micro_batch : int
        The most examples that go through the model at once, 0 for all; gradients add up.
    checkpointing : bool
        Whether activations inside blocks are computed again in backward, and not kept.
    """

    precision: str = "float32"
    micro_batch: int = 0
    checkpointing: bool = False

    def parts(self, batch: Batch, loss: LossFn) -> list[tuple[Batch, float | None]]:
        """Return parts of a batch, each with its share of the mean loss; None for the whole.

        A mean is over what counts: without labels of -100, which cross-entropy ignores, and with the
        weights of classes (`loss.terms`).
        """
        rows = len(next(iter(batch.values())))
        if not 0 < self.micro_batch < rows:
            return [(batch, None)]
        parts = [
            {name: tensor[start : start + self.micro_batch] for name, tensor in batch.items()}
            for start in range(0, rows, self.micro_batch)
        ]
        terms = [float(getattr(loss, "terms", _terms)(part)) for part in parts]
        total = sum(terms)
        return [(p, t / total) for p, t in zip(parts, terms, strict=True) if t] or [(batch, None)]


def _terms(batch: Batch) -> float:
    labels = batch.get("label")
    if labels is None or labels.is_floating_point():
        return float(len(next(iter(batch.values()))))
    return float((labels != IGNORED).sum()) / max(1, labels[0].numel())


def counting(batches: Iterable[Batch], loss: LossFn) -> Iterator[Batch]:
    """Yield the batches in which a target counts (`loss.counts`); the mean loss of others is 0 / 0."""
    yield from filter(getattr(loss, "counts", None) or (lambda batch: True), batches)


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
        for name in layer.trained:
            parameters[name].requires_grad_(layer.name in chosen)
            parameters[name].grad = None
        for name in layer.modules:
            modules[name].train(layer.name in chosen)
    for name in set(layers.embeddings.buffers).intersection(layers.embeddings.tensors):
        # A BatchNorm whose statistics are frozen.
        modules[name.rpartition(".")[0]].training = False
    try:
        yield
    finally:
        model.eval()
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None


@contextmanager
def recomputed(model: nn.Module, layers: LayerMap, trained: Iterable[str]) -> Iterator[None]:
    """Keep only the inputs of blocks for backward, which computes the rest again, within the context.

    Blocks below the lowest trained one keep nothing in any case. Blocks whose BatchNorm is trained are
    left as they are: it would count each batch twice.
    """
    from torch.utils.checkpoint import checkpoint

    chosen = set(trained)
    low = next((i for i, b in enumerate(layers.blocks) if b.name in chosen), layers.num_blocks)
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for name in (name for block in layers.blocks[low:] for name in block.modules):
            module = modules[name]
            counts = (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
            if not any(m.training for m in counts):
                forward = partial(checkpoint, module.forward, use_reentrant=False)
                stack.enter_context(with_forward(module, forward))
        yield


class Stepper:
    """Steps of one optimiser on some parameters.

    If the optimiser can move one parameter alone (`moved_alone`), it does so as soon as backward has the
    gradient, which is then freed. So there is one tensor's gradient at a time. Others need all of them:
    the optimisers of torch, and a bound on the norm of all gradients (`train.clip-gradient`), which is
    known at the end of backward only.

    Parameters
    ----------
    model : nn.Module
    parameters : Sequence[nn.Parameter]
    loss : LossFn
    optimizer : OptimizerFn
    how : Step
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        loss: LossFn,
        optimizer: OptimizerFn,
        how: Step,
    ) -> None:
        self.model, self.parameters, self.loss, self.how = model, parameters, loss, how
        self.optimizer = optimizer(list(parameters))
        self.live: LiveBytes | None = None
        self.progress: Progress | None = None
        self.value: Tensor | None = None
        """The loss before the last step, also if that was cut."""
        self._one = moved_alone(self.optimizer)
        self._last = False

    def _ready(self, parameter: nn.Parameter) -> None:
        if self.progress is not None:
            self.progress.reached(parameter, last=self._last)
        if self.live is not None:
            self.live.move(parameter.grad, "gradients")
        if self._one is not None and self._last:
            with self._moving():
                self._one(parameter)
            parameter.grad = None

    def __call__(self, batch: Batch) -> Tensor:
        """Make one step, and return the loss before it.

        Raises
        ------
        OutOfTime
            If the step was cut; the layers that it had finished have moved.
        """
        hooks = [
            p.register_post_accumulate_grad_hook(self._ready)  # type: ignore[no-untyped-call]
            for p in self.parameters
            if p.requires_grad
        ]
        try:
            parts = self.how.parts(batch, self.loss)
            total: Tensor | None = None
            for number, (part, share) in enumerate(parts, 1):
                self._last = number == len(parts)
                with autocast(self.parameters[0].device, self.how.precision):
                    value = self.loss(self.model, part)
                if share is not None:
                    value = value * share
                self.value = total = value.detach() if total is None else total + value.detach()
                value.backward()  # type: ignore[no-untyped-call]
        except OutOfTime:
            assert self.progress is not None
            for parameter in self.parameters:
                if not self.progress.has_finished(parameter):
                    parameter.grad = None
            self._move()
            raise
        finally:
            for hook in hooks:
                hook.remove()
        self._move()
        assert total is not None
        return total

    def _move(self) -> None:
        """Move all parameters that have a gradient, unless each has moved by itself."""
        if self._one is None:
            # The order that local SGD needs: gradients are used first and cleared afterwards.
            with self._moving():
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _moving(self) -> AbstractContextManager[None]:
        """Return a context in which the optimiser makes its state."""
        return nullcontext() if self.live is None else self.live.making("optimizer")

    def measured(self, batch: Batch, weights: float) -> tuple[Tensor, Phases]:
        """Make one step, and return the loss and the step's memory."""
        known = (*self.model.parameters(), *self.model.buffers(), *batch.values())
        with LiveBytes(known) as self.live:
            value = self(batch)
            found = self.live.phases(weights)
        self.live = None
        return value, found


def train_layers(
    model: nn.Module,
    layers: LayerMap,
    mask: Sequence[bool],
    batches: Iterable[Batch],
    loss: LossFn,
    optimizer: OptimizerFn,
    *,
    how: Step = Step(),
    cache: PrefixCache | None = None,
    clock: Clock | None = None,
) -> TrainResult:
    """Train the selected blocks and the head in place, with one optimiser step for each batch.

    Parameters
    ----------
    model : nn.Module
    layers : LayerMap
    mask : Sequence[bool]
        m_i, length L.
    batches : Iterable[Batch]
        One optimiser step is made on each in which a target counts. The caller must cut an endless
        iterable.
    loss : LossFn
        Returns the mean loss of a batch.
    optimizer : OptimizerFn
        Builds the optimiser from the parameters to train. It is new in every round, as in local SGD.
    how : Step
    cache : PrefixCache, optional
        Keeps the outputs of the blocks below the lowest selected one. It is of the same model.
    clock : Clock, optional
        It ends the training at its deadline; the first step begins in any case.

    Raises
    ------
    ValueError
        If there is no batch in which a target counts, or the loss is not finite. In the second case the
        weights are unusable.
    """
    chosen = layers.trained(mask)
    parameters = dict(model.named_parameters())
    trained = [parameters[name] for layer in chosen for name in layers[layer].trained]
    layer_of: dict[Tensor, str] = {
        parameters[name]: layer for layer in chosen for name in layers[layer].trained
    }
    moved, late = chosen, False
    losses: list[Tensor] = []
    flops, memory = 0.0, Phases()
    measured = _MEASURED.setdefault(model, {})
    low = next((i for i, selected in enumerate(mask) if selected), len(mask))
    prefix = cache and cache.below(low, how.precision)
    whole, examples = loss, 0
    if prefix:
        loss = prefix.resuming(whole)
    with selected_layers(model, layers, chosen), ExitStack() as stack:
        if how.checkpointing:
            stack.enter_context(recomputed(model, layers, chosen))
        step = Stepper(model, trained, loss, optimizer, how)
        for batch in counting(batches, whole):
            if clock is not None:
                step.progress = Progress(clock, layer_of)
                if late := bool(losses) and clock.over:
                    break
            examples += len(next(iter(batch.values())))
            if prefix:
                batch = prefix.joined(model, batch, whole)
            kind = ("train", tuple(mask), how, getattr(step.optimizer, "momentum", None))
            shapes = tuple((name, tuple(tensor.shape)) for name, tensor in batch.items())
            key = (kind, now_skipped(model), shapes)
            try:
                if key in measured:
                    value, cost = counted(model, kind, batch, partial(step, batch))
                else:
                    weights = weights_in_training(model, layers, chosen)
                    run = partial(step.measured, batch, weights)
                    (value, measured[key]), cost = counted(model, kind, batch, run)
            except OutOfTime:
                assert step.progress is not None
                assert step.value is not None
                moved, late = (chosen if losses else step.progress.finished), True
                if step.progress.finished or not losses:
                    losses.append(step.value)
                break
            memory = memory.most(measured[key])
            losses.append(value)
            flops += cost
    if not losses:
        raise ValueError("there is no batch to train on in which a target counts")
    mean = float(torch.stack(losses).mean())
    if not torch.isfinite(torch.tensor(mean)):
        raise ValueError(f"the training loss is {mean}; lower train.lr")
    found, saved = 0, 0.0
    if prefix:
        found, saved, flops = prefix.found, prefix.saved, flops + prefix.flops
    return TrainResult(mean, len(losses), flops, tuple(moved), late, memory, found, examples, saved)


def train_update(
    resident: ResidentModel,
    mask: Sequence[bool],
    batches: Iterable[Batch],
    loss: LossFn,
    optimizer: OptimizerFn,
    *,
    how: Step = Step(),
    schedule: Sequence[tuple[Sequence[bool], int]] = (),
    cache: PrefixCache | None = None,
    clock: Clock | None = None,
    then: Callable[[TrainResult], None] = lambda result: None,
) -> tuple[dict[str, np.ndarray], TrainResult]:
    """Train like `train_layers` and return Δ_i (eq. 4) of the trained layers' tensors, by name.

    A schedule is a list of masks with a number of steps for each. They are trained one after the other,
    each with a new optimiser, and `mask` is their union. The last mask gets all remaining batches.

    A client that is late has moved the layers that its result names, and may have moved others in part.
    `then` is called with the result, while the model still is as training left it.
    The resident model is back at θ^t afterwards, also if training raises.
    """
    results = list[TrainResult]()
    # A mask's steps are those in which a target counts; the last ones may have none left.
    stream = counting(batches, loss) if schedule else iter(batches)
    with resident.borrowed(resident.layers.trained(mask)) as before:
        for part, steps in [*schedule[:-1], (schedule[-1][0] if schedule else mask, None)]:
            cut = islice(stream, steps)
            first = tuple(islice(cut, 1))
            if not results or (first and not results[-1].late):
                found = train_layers(
                    resident.model,
                    resident.layers,
                    part,
                    chain(first, cut),
                    loss,
                    optimizer,
                    how=how,
                    cache=cache,
                    clock=clock,
                )
                results.append(found)
        result = TrainResult.together(results)
        then(result)
        # In place, since the trained tensors are copies that are not needed any more.
        update = {
            name: resident.tensors[name].detach().sub_(start).cpu().numpy()
            for name, start in before.items()
        }
    return update, result


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    logits: Callable[[nn.Module, Batch], Tensor],
) -> tuple[float, float]:
    """Return accuracy in [0, 1] and mean cross-entropy over all batches, for an app without a `Task`."""
    tally = SingleLabel()
    tallied(model, batches, lambda net, batch: tally.update(logits(net, batch), batch["label"]))
    found = tally.values()
    return found["accuracy"], tally.mean_loss
