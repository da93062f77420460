"""Frozen weights in the type that they are stored in, which are cast as they are used.

A `Stored` tensor looks like float32 to a model and to autograd, and holds the weights in half
precision, in 8 or in 4 bits. Each operation that reads it casts it, and the cast is freed at once.
Autograd keeps the `Stored` tensor itself for backward, so a frozen layer is never in memory as float32,
but for the one tensor that is in use.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from layerfed.config import Storage
from layerfed.config.errors import naming_extras

__all__ = [
    "Decoded",
    "Half",
    "Held",
    "Stored",
    "as_stored",
    "decoded",
    "held_bytes",
    "is_lossy",
    "owners",
    "page_out",
    "put",
    "stored",
    "stored_like",
]

HALF = (torch.float16, torch.bfloat16)
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Smaller tensors, such as norms and biases, stay in half precision: they are a thousandth of a model.
LEAST_QUANTISED = 4096
# Elements that share a scale; the libraries' own defaults.
BLOCK = {"int8": 256, "4bit": 64}

# Operations that only say which elements are meant. They give another `Stored` tensor of the same
# weights.
_ATEN = torch.ops.aten
VIEWS = {
    getattr(_ATEN, name)
    for name in (
        *("alias", "detach", "expand", "permute", "select", "slice"),
        *("squeeze", "t", "transpose", "unsqueeze", "view"),
    )
}


class Held(Protocol):
    """Weights as they lie in memory."""

    @property
    def device(self) -> torch.device:
        """The device that holds them."""

    @property
    def nbytes(self) -> int:
        """Their size."""

    def decoded(self) -> Tensor:
        """Return the weights in float32, contiguous and of their first shape."""


@dataclass(frozen=True)
class Half:
    """Weights in half precision, perhaps memory-mapped."""

    values: Tensor

    @property
    def device(self) -> torch.device:
        """The device that holds them."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Their size."""
        return self.values.nbytes

    def decoded(self) -> Tensor:
        """Return the weights in float32."""
        return self.values.float()


@dataclass(frozen=True)
class Quantised:
    """Weights in 8 or 4 bits a number, in blocks with a scale each, by bitsandbytes."""

    codes: Tensor
    scales: Any
    decode: Callable[..., Tensor]

    @property
    def device(self) -> torch.device:
        """The device that holds them."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """The size of codes and scales."""
        return self.codes.nbytes + cast(Tensor, self.scales.absmax).nbytes

    def decoded(self) -> Tensor:
        """Return the weights in float32."""
        return self.decode(self.codes, self.scales)


class Stored(Tensor):
    """A float32 tensor to its users, whose elements are `held` in fewer bytes; it cannot be written.

    Parameters
    ----------
    held : Held
    like : Tensor
        A tensor with the shape, strides and offset into the weights, on `meta`.
    """

    held: Held
    # Autograd and torch's modules see a plain tensor; only the operations themselves are intercepted.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Held, like: Tensor, *, grad: bool = False) -> Stored:
        """Make a tensor without memory of its own."""
        made: Stored = Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=torch.float32,
            device=held.device,
            requires_grad=grad,
        )
        made.held = held
        return made

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes in memory."""
        return self.held.nbytes

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Name the shape and what holds it, without decoding."""
        return f"Stored({tuple(self.shape)}, {type(self.held).__name__})"

    def _of(self, values: Tensor) -> Tensor:
        """Return the elements that this tensor means, among all the weights that are held."""
        start = values.storage_offset() + self.storage_offset()
        return values.as_strided(self.shape, self.stride(), start)

    def float32(self) -> Tensor:
        """Return the elements as a plain tensor."""
        with torch.no_grad():
            return self._of(self.held.decoded())

    def casts_whole(self, func: Any, dtype: torch.dtype | None) -> bool:
        """Return whether an operation casts all that is held, and not only rows or nothing."""
        if not isinstance(self.held, Half):
            return True
        return func._overloadpacket is not _ATEN.embedding and not self._is_held_in(func, dtype)

    def _is_held_in(self, func: Any, dtype: torch.dtype | None) -> bool:
        """Return whether an operation asks for the type that is there, as mixed precision does."""
        half = isinstance(self.held, Half) and self.held.values.dtype == dtype
        return half and func._overloadpacket is _ATEN._to_copy

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the cast weights, or on the stored ones where that is the same."""
        kwargs, packet = kwargs or {}, func._overloadpacket
        first = args[0] if args and isinstance(args[0], Stored) else None
        if first is not None:
            half = first.held.values if isinstance(first.held, Half) else None
            if packet in VIEWS and (packet is not _ATEN.view or func is _ATEN.view.default):
                like = torch.empty_strided(first.shape, first.stride(), device="meta")
                seen = func(like, *args[1:], **kwargs)
                start = first.storage_offset() + seen.storage_offset()
                if start:
                    extent = sum(
                        (n - 1) * s for n, s in zip(seen.shape, seen.stride(), strict=True)
                    )
                    whole = torch.empty(start + extent + 1, device="meta")
                    seen = whole.as_strided(seen.shape, seen.stride(), start)
                return Stored(first.held, seen)
            if packet is _ATEN.embedding and half is not None:
                return func(first._of(half), *args[1:], **kwargs).float()
            if half is not None and first._is_held_in(func, kwargs.get("dtype")):
                # Not a copy, which autograd would keep for backward beside what is held.
                where = torch.device(kwargs.get("device") or half.device)
                return first._of(half).to(where)
        if func._schema.is_mutable and any(isinstance(a, Stored) for a in _written(func, args)):
            raise RuntimeError(f"{func} would write to frozen weights that are stored as they are")
        plain = lambda value: decoded(value) if isinstance(value, Stored) else value  # noqa: E731
        return func(*tree_map(plain, args), **tree_map(plain, kwargs))


def _written(func: Any, args: tuple[Any, ...]) -> Iterator[Any]:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield value


def decoded(tensor: Tensor) -> Tensor:
    """Return a tensor's elements as a plain tensor: float32 if they are held in less."""
    if isinstance(tensor, Stored):
        return tensor.float32()
    plain = tensor.detach()
    return plain.float() if plain.dtype in HALF else plain


def held_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes that tensors take in memory."""
    return sum(tensor.nbytes for tensor in tensors.values())


def as_stored(
    tensor: Tensor, storage: Storage, device: torch.device, *, table: bool = False
) -> Tensor:
    """Return frozen weights as they are to be kept on a device.

    Parameters
    ----------
    tensor : Tensor
        The weights in the checkpoint's type.
    storage : {"checkpoint", "float32", "bfloat16", "float16", "int8", "4bit"}
    device : torch.device
    table : bool
        Whether rows are looked up in it, one for each token. Such a table stays in half precision, in
        which a lookup casts only the rows that it reads.
    """
    plain = tensor.detach()
    if isinstance(plain, Stored):
        assert isinstance(plain.held, Half), "the checkpoint's own weights"
        plain = plain.held.values
    if not plain.is_floating_point() or storage == "float32":
        return decoded(plain).to(device)
    if storage in BLOCK and not table and plain.ndim > 1 and plain.numel() >= LEAST_QUANTISED:
        with naming_extras(f"model.storage = '{storage}'"):
            library = import_module("bitsandbytes.functional")
        source = plain.to(device).float().contiguous()
        if storage == "int8":
            codes, scales = library.quantize_blockwise(source, blocksize=BLOCK[storage])
            held = Quantised(codes, scales, library.dequantize_blockwise)
        else:
            codes, scales = library.quantize_4bit(
                source, blocksize=BLOCK[storage], quant_type="nf4"
            )
            held = Quantised(codes, scales, library.dequantize_4bit)
    else:
        if storage in TYPES or (storage in BLOCK and plain.dtype not in HALF):
            plain = plain.to(TYPES.get(storage, torch.bfloat16))
        if plain.dtype not in HALF:
            return plain.to(device)
        return stored(plain.to(device))
    return Stored(held, torch.empty(source.shape, device="meta"))


def stored_like(tensor: Tensor, storage: str, *, table: bool = False) -> Tensor:
    """Return what `as_stored` makes of a tensor without weights, without the library that it needs."""
    if storage in BLOCK and not table and tensor.ndim > 1 and tensor.numel() >= LEAST_QUANTISED:
        share = {"int8": 1, "4bit": 2}[storage]
        blocks = -(-tensor.numel() // BLOCK[storage])
        like = tensor.detach()
        held = Quantised(
            torch.empty(tensor.numel() // share, dtype=torch.uint8, device="meta"),
            SimpleNamespace(absmax=torch.empty(blocks, device="meta")),
            lambda *_: torch.empty_like(like),
        )
        return Stored(held, like)
    if not tensor.is_floating_point():
        return tensor
    return stored(tensor.detach().to(TYPES.get(storage, torch.bfloat16)))


def stored(values: Tensor) -> Stored:
    """Return weights in half precision as they are, for use as float32."""
    return Stored(Half(values.contiguous()), torch.empty(values.shape, device="meta"))


def is_lossy(tensor: Tensor, storage: Storage) -> bool:
    """Return whether `storage` keeps less of a checkpoint's weights than they have."""
    if storage in ("checkpoint", "float32") or not tensor.is_floating_point():
        return False
    held = tensor.held.values.dtype if isinstance(tensor, Stored) else tensor.dtype  # type: ignore[attr-defined]
    return held != TYPES.get(storage)


class Decoded(Mapping[str, Tensor]):
    """Tensors by name, each of which is cast to float32 when it is read, and not kept.

    Parameters
    ----------
    tensors : Mapping[str, Tensor]
    device : torch.device, optional
        Where to put what is read; by default it stays where it is.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device | None = None) -> None:
        self._tensors, self._device = tensors, device

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor."""
        found = decoded(self._tensors[name])
        return found if self._device is None else found.to(self._device)

    def __iter__(self) -> Iterator[str]:
        """Return the names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._tensors)


Owner = tuple[nn.Module, str]


def owners(model: nn.Module) -> dict[str, list[Owner]]:
    """Return where a model holds each parameter and buffer: modules and attributes, several if tied."""
    first = {
        id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    found: dict[str, list[Owner]] = {name: [] for name in first.values()}
    for module in model.modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[first[id(tensor)]].append((module, attribute))
    return found


def put(places: list[Owner], value: Tensor) -> Tensor:
    """Put a tensor into a model in place of another, and return what the model holds now."""
    module, attribute = places[0]
    if attribute in module._parameters and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    for module, attribute in places:
        setattr(module, attribute, value)
    return value


def page_out(tensor: Tensor) -> None:
    """Let the system drop a mapped file's pages, which have been read and are not needed soon.

    They count as this process's memory until then. Pages that are no file's stay as they are.
    """
    page, pageout = mmap.PAGESIZE, 21  # MADV_PAGEOUT of Linux, which Python does not name
    begin = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is not None and end > begin:
        advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(pageout))
