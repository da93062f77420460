"""The memory of a training step by phase: counted while it runs, or predicted without weights."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layerfed.client.limits import free_memory
from layerfed.models.layers import LayerMap
from layerfed.models.stored import Half, Stored, owners, put, stored_like
from layerfed.task.base import Task

__all__ = [
    "LiveBytes",
    "Phases",
    "as_predicted",
    "fused_attention",
    "rows_that_fit",
    "weights_in_training",
]

MOST_ROWS = 256
# What the activations of an evaluation may take: bytes on a CPU, a share of what is free on a GPU.
CPU_ACTIVATIONS, GPU_SHARE = 2.5e8, 0.25

Kind = Literal["activations", "gradients", "optimizer"]


@dataclass(frozen=True)
class Phases:
    """Bytes of a training step, each at its own peak.

    Attributes
    ----------
    weights : float
        The model as it is held, and the float32 copies of the layers in training.
    activations : float
        What forward and backward make, besides gradients.
    gradients : float
        The most that is held at once.
    optimizer : float
        The optimiser's state.
    peak : float
        All together at the worst moment of a step that is not the first one, in which the optimiser has
        its whole state. It is less than the sum of the four.
    """

    weights: float = 0.0
    activations: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    peak: float = 0.0

    def most(self, other: Phases) -> Phases:
        """Return the larger of each number."""
        names = (field.name for field in fields(self))
        return Phases(*(max(getattr(self, n), getattr(other, n)) for n in names))


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that counts the bytes of the tensors that its operations make, while they live.

    Memory inside an operation is not seen, but for the cast of a frozen weight.

    Parameters
    ----------
    known : Iterable[Tensor]
        Tensors that exist already, such as weights and the batch; they do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        held = (t.held if isinstance(t, Stored) else t for t in known)
        there = (h.values if isinstance(h, Half) else h for h in held)
        self._known = {self._key(tensor) for tensor in there if isinstance(tensor, Tensor)}
        self._live: dict[int, tuple[int, Kind]] = {}
        self._now: dict[Kind, int] = {"activations": 0, "gradients": 0, "optimizer": 0}
        self._most = dict(self._now)
        self._peak = 0
        self._made: Kind = "activations"

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # skipping the compiler is what imports it

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count what it made."""
        out = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for leaf in leaves:
            self._count(leaf)
        cast = 0
        if not all(isinstance(leaf, Stored) for leaf in leaves):
            weights = (a for a in tree_leaves((args, kwargs)) if isinstance(a, Stored))
            dtype = (kwargs or {}).get("dtype")
            cast = sum(a.numel() * 4 for a in weights if a.casts_whole(func, dtype))
        self._now["activations"] += cast
        self._note()
        self._now["activations"] -= cast
        return out

    def _count(self, tensor: Tensor) -> None:
        if isinstance(tensor, Stored):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._live or not size:
            return
        self._live[key] = size, self._made
        self._now[self._made] += size
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        size, kind = self._live.pop(key, (0, "activations"))
        self._now[kind] -= size

    def _note(self) -> None:
        for kind, size in self._now.items():
            self._most[kind] = max(self._most[kind], size)
        self._peak = max(self._peak, self._now["activations"] + self._now["gradients"])

    def move(self, tensor: Tensor | None, kind: Kind) -> None:
        """Count a tensor as a gradient, or as the optimiser's, from now on."""
        key = 0 if tensor is None else self._key(tensor)
        if key in self._live:
            size, before = self._live[key]
            self._live[key] = size, kind
            self._now[before] -= size
            self._now[kind] += size
            self._note()

    @contextmanager
    def making(self, kind: Kind) -> Iterator[None]:
        """Count what is made within the context as of this kind."""
        self._made = kind
        try:
            yield
        finally:
            self._made = "activations"

    def phases(self, weights: float) -> Phases:
        """Return the peaks, given the bytes of the weights."""
        most = {str(kind): float(size) for kind, size in self._most.items()}
        # From the second step on, the optimiser's state is there all the time.
        peak = weights + self._peak + most["optimizer"]
        most["optimizer"] = float(self._now["optimizer"])  # without what its steps took meanwhile
        return Phases(weights=weights, **most, peak=peak)


@torch.no_grad()
def rows_that_fit(task: Task, model: nn.Module, device: torch.device) -> int:
    """Return the rows of an evaluation's batch: 256, or the power of two below whose activations fit.

    They are counted by forward passes of one and of two rows, as large as the task has them. On a CPU
    the result depends on the model and the task alone, so that a run can be repeated.
    """
    largest = task.largest_batch(2)
    if largest is None:
        return MOST_ROWS
    rows = {n: torch.ones(t.shape, dtype=t.dtype, device=device) for n, t in largest.items()}
    known = (*model.parameters(), *model.buffers(), *rows.values())
    model.eval()
    found = []
    for count in (1, 2):
        with LiveBytes(known) as live:
            task.logits(model, {name: tensor[:count] for name, tensor in rows.items()})
        found.append(live.phases(0.0).activations)
    room = CPU_ACTIVATIONS if device.type == "cpu" else GPU_SHARE * free_memory(device)
    fitting = max(1, int(room / max(1.0, found[1] - found[0])))
    return min(MOST_ROWS, 1 << (fitting.bit_length() - 1))


def weights_in_training(model: nn.Module, layers: LayerMap, chosen: Iterable[str]) -> float:
    """Return the bytes of a model as it is held, and of the copies of some layers that are trained."""
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return float(held + sum(layers[name].trained_bytes for name in chosen))


@contextmanager
def as_predicted(
    model: nn.Module, layers: LayerMap, chosen: Sequence[str], storage: str
) -> Iterator[None]:
    """Hold a model without weights as `storage` says, with some layers ready for training.

    Parameters
    ----------
    model : nn.Module
        In float32, on torch's `meta` device.
    layers : LayerMap
    chosen : Sequence[str]
        The layers that are trained.
    storage : {"float32", "bfloat16", "float16", "int8", "4bit"}
    """
    places, before = owners(model), {}
    frozen = [layer for layer in layers.storable if layer.name not in chosen]
    tables = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    if storage != "float32":
        for name in (n for layer in frozen for n in layer.parameters):
            module, attribute = places[name][0]
            before[name] = getattr(module, attribute)
            put(places[name], stored_like(before[name], storage, table=name in tables))
    try:
        with fused_attention():
            yield
    finally:
        for name, parameter in before.items():
            put(places[name], parameter)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Let attention on `meta` take the memory that it takes on a processor.

    On `meta`, torch computes it step by step and keeps the matrix of all pairs of tokens. A processor
    does so with dropout only; a GPU does not, and takes less then.
    """
    plain = functional.scaled_dot_product_attention

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not query.is_meta or dropout_p > 0:
            mask, gqa = attn_mask, enable_gqa
            return plain(query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=gqa)
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = (t.repeat_interleave(groups, -3) for t in (key, value))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out: Tensor = operation(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
        return out

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain
