"""Count FLOPs as torch does, once for each kind of step.

What counts are products of matrices, convolutions, attention and recurrent layers, at two FLOPs for each
multiplication. Work on single elements (norms, activations, sums) counts nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from logging import WARNING
from math import prod
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from flwr.common.logger import log
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from layerfed.client.skipping import now_skipped
from layerfed.models.layers import LayerMap
from layerfed.task.base import Batch

__all__ = ["TotalFlops", "counted", "forward_flops"]

T = TypeVar("T")
Shape = Sequence[int]
Formula = Callable[..., float]

# The FLOPs of a step depend only on the mask and on the batch's shapes, and counting doubles the time
# of a step. So each combination is counted once, and the count is kept as long as its model lives.
_KNOWN: WeakKeyDictionary[nn.Module, dict[object, float]] = WeakKeyDictionary()


# Names of operations that do more arithmetic than one step for each element.
ARITHMETIC = re.compile(
    r"mm(?![a-z])|matmul|mv_?$|dot|conv(?!ert)|atten|multi_head|linear|rnn|lstm|gru|fft|cdist"
    r"|einsum|solve|svd|eig|_qr|geqrf|det$|lu_factor|_inv|inverse|cholesky|matrix_(exp|power)|encoder_layer"
)
NO_ARITHMETIC = re.compile(
    r"upsample|flatten|cell|reorder|prepack|fft_?(freq|shift)|plan_cache|slice_"
)
# Their operations do no arithmetic; those of any other library may.
PLAIN = ("prim", "prims", "rngprims", "profiler")
_NAMED: set[str] = set()


def arithmetic(packet: Any) -> bool:
    """Say whether an operation does arithmetic that should be counted, going by its name."""
    library, _, name = str(packet).rpartition(".")
    if library != "aten":
        return library not in PLAIN
    return ARITHMETIC.search(name) is not None and NO_ARITHMETIC.search(name) is None


def _counter() -> FlopCounterMode:
    """Return torch's counter, extended by what it does not know, or counts wrongly.

    If nothing needs a gradient, `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` run one fused
    operation each, which torch's counter does not know. They are a third of a frozen CLIP block. In some
    versions it does not know the operation of `scaled_dot_product_attention` on a CPU either. The
    gradient of a grouped convolution's weights it counts once a group too often.
    """
    mapping = {}
    for name, formula in _FORMULAS.items():
        library, operation = name.split(".")
        # Not every version has all of them, and a library registers its own when it is imported.
        if (packet := getattr(getattr(torch.ops, library), operation, None)) is not None:
            mapping[packet] = formula
    return FlopCounterMode(display=False, custom_mapping=mapping)


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
        packet = func._overloadpacket
        formula = self._formulas.get(packet)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        elif arithmetic(packet) and str(packet) not in _NAMED:
            _NAMED.add(str(packet))
            log(WARNING, "FLOPs leave out %s, for which there is no formula", packet)
        return out


def _convolution_back(
    grad: Shape,
    source: Shape,
    weight: Shape,
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    wanted: Sequence[bool],
    **_: Any,
) -> float:
    """Return the FLOPs of a convolution's gradients, each of which takes as many as forward."""
    positions = prod((source if transposed else grad)[2:])
    return 2.0 * source[0] * positions * prod(weight) * sum(wanted[:2])


def _product(first: Shape, second: Shape, *_: Any, **__: Any) -> float:
    """Return the FLOPs of a product of matrices, of batches of them, or of a matrix and a vector."""
    return 2.0 * prod(first) * (second[-1] if len(second) > 1 else 1)


def _grouped_product(first: Shape, second: Shape, *_: Any, **__: Any) -> float:
    """Return the FLOPs of the products of mixed experts, each on its group of rows or columns.

    Of (G, M, K) and (K, N) each of the G matrices meets its own columns only.
    """
    return _product(first[1:] if len(first) > len(second) else first, second)


def _added(_bias: Shape, *factors: Any, **_: Any) -> float:
    return _product(*factors)


def _linear(source: Shape, weight: Shape, *_: Any, **__: Any) -> float:
    return 2.0 * prod(source) * weight[0]


def _recurrent(source: Shape, *weights: Any, **_: Any) -> float:
    """Return the FLOPs of recurrent layers: each matrix meets each token. cuDNN has one list of them."""
    matrices = weights[0] if weights and isinstance(weights[0], list) else weights[:2]
    return 2.0 * prod(source[:-1]) * sum(prod(w) for w in matrices if len(w) == 2)


def _twice(formula: Formula) -> Formula:
    """Return the FLOPs of a gradient by both factors, given those of forward."""
    return lambda *shapes, **named: 2 * formula(*shapes, **named)


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


_FORMULAS: dict[str, Formula] = {
    "aten._native_multi_head_attention": _attention_flops,
    "aten._transformer_encoder_layer_fwd": _encoder_layer_flops,
    "aten._scaled_dot_product_flash_attention_for_cpu": _products,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _products_back,
    "aten.convolution_backward": _convolution_back,
    **dict.fromkeys(("aten.mv", "aten.dot", "aten.vdot"), _product),
    **dict.fromkeys(("aten.addmm_", "aten.addbmm", "aten.baddbmm_", "aten.addmv"), _added),
    "aten._addmm_activation": _added,
    **dict.fromkeys(("aten.linear", "aten.mkldnn_linear"), _linear),
    **dict.fromkeys(("aten._grouped_mm", "aten._scaled_grouped_mm"), _grouped_product),
    "transformers.grouped_mm_fallback": _grouped_product,
    "transformers.grouped_mm_fallback_backward": _twice(_grouped_product),
    **dict.fromkeys(("aten.mkldnn_rnn_layer", "aten._cudnn_rnn"), _recurrent),
    "aten.mkldnn_rnn_layer_backward": _twice(_recurrent),
    "aten._cudnn_rnn_backward": _twice(_recurrent),
}


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
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in batch.items())
    key = (kind, now_skipped(model), shapes)
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
    layer_of = {
        model.get_submodule(m): layer.name for layer in layers.layers for m in layer.modules
    }
    by_layer = dict.fromkeys((layer.name for layer in layers.layers), 0.0)
    began: dict[nn.Module, float] = {}

    def before(module: nn.Module, *_: Any) -> None:
        if module in layer_of:
            began[module] = flops.total

    def after(module: nn.Module, *_: Any) -> None:
        if module in layer_of:
            by_layer[layer_of[module]] += flops.total - began[module]

    model.eval()
    # Hooks of the modules' own would keep torch from its fused operations.
    hooks = (register_module_forward_pre_hook(before), register_module_forward_hook(after))
    try:
        with torch.no_grad(), TotalFlops() as flops:
            logits(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return by_layer, flops.total
