"""FLOPs as torch counts them, at no cost after the first step of a kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from layerfed.models.layers import LayerMap
from layerfed.task.base import Batch

__all__ = ["TotalFlops", "counted", "forward_flops"]

T = TypeVar("T")
Shape = Sequence[int]

# The FLOPs of a step depend on what is selected and on the batch's shapes only, and counting doubles the
# time of a step, so each combination is counted once and remembered as long as its model lives.
_KNOWN: WeakKeyDictionary[nn.Module, dict[object, float]] = WeakKeyDictionary()


def _counter() -> FlopCounterMode:
    """Return torch's counter, taught the fused attention of CPUs and of frozen layers.

    Where nothing needs a gradient, `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` take one
    fused operation each, which torch's counter knows nothing of: a third of a frozen CLIP block. Nor
    does it know, in some versions, what `scaled_dot_product_attention` becomes on a CPU.
    """
    return FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.aten._native_multi_head_attention: _attention_flops,
            torch.ops.aten._transformer_encoder_layer_fwd: _encoder_layer_flops,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _products,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _products_back,
        },
    )


class TotalFlops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the FLOPs of what runs in its context, by the formulas of torch's counter.

    That counter imports torch's compiler, which takes longer than a round on a small model; on real
    devices every message starts a new process.

    Attributes
    ----------
    total : float
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0
        self._formulas = _counter().flop_registry

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # skipping the compiler is what imports it

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Run an operation and count it, or what it is composed of."""
        kwargs = kwargs or {}
        if func is not torch.ops.prim.device.default:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def _products(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> float:
    return float(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _products_back(
    grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any
) -> float:
    return float(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]


def _attention_flops(
    query: Shape, key: Shape, value: Shape, width: int, *_: Any, **__: Any
) -> float:
    """Four projections and two products of self-attention, at two FLOPs a multiplication."""
    batch, tokens, _width = query
    return 2 * batch * tokens * width * (4 * width + 2 * tokens)


def _encoder_layer_flops(source: Shape, width: int, *rest: Any, **__: Any) -> float:
    """Attention, and the feed-forward network, whose first weight (F, E) is the 15th argument."""
    batch, tokens, _width = source
    hidden = int(rest[12][0])
    return _attention_flops(source, source, source, width) + 4 * batch * tokens * width * hidden


def counted(model: nn.Module, kind: object, batch: Batch, step: Callable[[], T]) -> tuple[T, float]:
    """Run a step and return its result and its FLOPs, forward and backward together.

    Parameters
    ----------
    model : nn.Module
    kind : object
        Hashable; steps of one kind on batches of one shape cost the same.
    batch : Batch
    step : Callable[[], T]
    """
    known = _KNOWN.setdefault(model, {})
    key = (kind, tuple((name, tuple(tensor.shape)) for name, tensor in batch.items()))
    if key in known:
        return step(), known[key]
    with TotalFlops() as flops:
        result = step()
    known[key] = float(flops.total)
    return result, known[key]


def forward_flops(
    model: nn.Module,
    layers: LayerMap,
    example: Batch,
    logits: Callable[[nn.Module, Batch], Tensor],
) -> tuple[dict[str, float], float]:
    """Count the FLOPs of an example's forward pass: of each layer by name, and of the whole model.

    What a model computes between its modules (such as a product with a loose parameter) is part of
    the whole only.

    Parameters
    ----------
    model : nn.Module
    layers : LayerMap
    example : Batch
        A batch of one.
    logits : Callable[[nn.Module, Batch], Tensor]
        The task's forward pass.
    """
    model.eval()
    with torch.no_grad(), _counter() as flops:
        logits(model, example)
    # The counter calls modules by the class of the outermost one and their names within it.
    root = type(model).__name__
    by_module = {
        module: float(sum(operations.values()))
        for module, operations in flops.get_flop_counts().items()
    }
    by_layer = {
        layer.name: sum(by_module.get(f"{root}.{module}", 0.0) for module in layer.modules)
        for layer in layers.layers
    }
    return by_layer, float(flops.get_total_flops())
