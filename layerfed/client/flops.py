"""Count FLOPs as torch does, once for each kind of step."""

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

# The FLOPs of a step depend only on the mask and on the batch's shapes, and counting doubles the time
# of a step. So each combination is counted once, and the count is kept as long as its model lives.
_KNOWN: WeakKeyDictionary[nn.Module, dict[object, float]] = WeakKeyDictionary()


def _counter() -> FlopCounterMode:
    """Return torch's counter, extended by the fused attention of CPUs and of frozen layers.

    If nothing needs a gradient, `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` run one fused
    operation each, which torch's counter does not know. They are a third of a frozen CLIP block. In some
    versions it does not know the operation of `scaled_dot_product_attention` on a CPU either.
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
    """A context that adds up the FLOPs of its operations, by the formulas of torch's counter.

    It replaces torch's own counter, which imports torch's compiler. The import takes longer than a round
    on a small model, and on real devices every message starts a new process.

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
        """Run an operation and count it, or count the operations that it is composed of."""
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
    """Return the FLOPs of self-attention: four projections and two products, two a multiplication."""
    batch, tokens, _width = query
    return 2 * batch * tokens * width * (4 * width + 2 * tokens)


def _encoder_layer_flops(source: Shape, width: int, *rest: Any, **__: Any) -> float:
    """Return the FLOPs of attention and of the feed-forward network.

    The network's first weight, of shape (F, E), is the 15th argument.
    """
    batch, tokens, _width = source
    hidden = int(rest[12][0])
    return _attention_flops(source, source, source, width) + 4 * batch * tokens * width * hidden


def counted(model: nn.Module, kind: object, batch: Batch, step: Callable[[], T]) -> tuple[T, float]:
    """Run a step and return its result and its FLOPs, forward and backward together.

    Parameters
    ----------
    model : nn.Module
    kind : object
        A hashable key; steps of one kind on batches of one shape cost the same.
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
    """Count the FLOPs of an example's forward pass, for each layer by name and for the whole model.

    Operations between modules (such as a product with a loose parameter) count for the whole model only.

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
    # The counter names modules by the class of the outermost module and their names inside it.
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
