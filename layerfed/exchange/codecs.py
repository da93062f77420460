"""Codecs: formats in which an update or a layer is sent, with fewer bytes and an error.

=========== ========= ==========================================================================
codec       bytes     error of each element x
=========== ========= ==========================================================================
float32     4         none
float16     2         |x| · 2⁻¹¹, or 2⁻²⁵ if |x| < 2⁻¹⁴ (tiny updates vanish); |x| must be < 65,520
bfloat16    2         |x| · 2⁻⁸, over the whole range of float32
int8        1         max|row| / 254, with rows along the first dimension; the error is remembered
                      on the client and added to its next update of the layer (error feedback)
=========== ========= ==========================================================================

Error feedback is that of Seide et al. (2014) and Karimireddy et al. (2019). The client sends C(Δ + e)
and keeps e ← Δ + e − C(Δ + e), so no part of an update is lost, only delayed.

What the server sends is coded as each layer's change since the base (`written`), which every client
has. So one message is enough for a client that was away for any number of rounds, and all clients have
the same layer. Amiri et al. [arXiv 2006.10672] code the change since the last round, which only a
client that was there can decode; they show that changes lose far less than values do. The server moves
its exact model, so it still has what rounding left out, and the next version of the layer gets it: with
e the difference of the exact layer and the clients' one, the next version is C(what the clients have +
update + e), which is error feedback.

Only parameters in float32 are coded. Buffers are sent as they are: rounding a change of BatchNorm's
running variance can make the variance negative, and the model's output NaN.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any, Self

import numpy as np

from layerfed.exchange.arrays import RefusedReply
from layerfed.exchange.bounds import check_values
from layerfed.exchange.store import LayerStore
from layerfed.models.layers import LayerMap

__all__ = ["CODECS", "Codec", "codec_of", "compress", "read", "written"]

# Suffix of a tensor's name; no tensor of a torch model has such a name.
SCALE = "#scale"

Parts = dict[str, np.ndarray]
Spec = tuple[tuple[int, ...], np.dtype[Any]]


class Codec(ABC):
    """Writes an update's tensors as arrays for a message, and reads them back."""

    feedback = False
    """Whether the client keeps the error for its next update (error feedback)."""
    exact: frozenset[str] = frozenset()
    """Names of the tensors that are sent as they are, whatever their type."""

    def sparing(self, names: Iterable[str]) -> Self:
        """Return this codec for a model in which some tensors, its buffers, are not to be coded."""
        spared = copy(self)
        spared.exact = frozenset(names)
        return spared

    def codes(self, name: str, dtype: np.dtype[Any]) -> bool:
        """Say whether a tensor is coded; others are sent as they are."""
        return dtype == np.float32 and name not in self.exact

    def encode(self, update: Mapping[str, np.ndarray]) -> Parts:
        """Return the arrays to send, by name."""
        parts: Parts = {}
        for name, values in update.items():
            parts.update(
                self._write(name, values) if self.codes(name, values.dtype) else {name: values}
            )
        return parts

    def decode(self, name: str, like: np.ndarray, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return one tensor of an update, from the arrays that `parts_of` names."""
        return self._read(name, parts) if self.codes(name, like.dtype) else parts[name]

    def parts_of(self, name: str, like: np.ndarray) -> dict[str, Spec]:
        """Return name, shape and dtype of the arrays in which one tensor is sent."""
        if not self.codes(name, like.dtype):
            return {name: (like.shape, like.dtype)}
        return self._spec(name, like.shape)

    @abstractmethod
    def _write(self, name: str, values: np.ndarray) -> Parts: ...

    @abstractmethod
    def _read(self, name: str, parts: Mapping[str, np.ndarray]) -> np.ndarray: ...

    @abstractmethod
    def _spec(self, name: str, shape: tuple[int, ...]) -> dict[str, Spec]: ...


class _Float32(Codec):
    def _write(self, name: str, values: np.ndarray) -> Parts:
        return {name: values}

    def _read(self, name: str, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        return parts[name]

    def _spec(self, name: str, shape: tuple[int, ...]) -> dict[str, Spec]:
        return {name: (shape, np.dtype(np.float32))}


class _Float16(Codec):
    def _write(self, name: str, values: np.ndarray) -> Parts:
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all() and np.isfinite(values).all():
            raise ValueError(
                f"the change of '{name}' reaches {np.abs(values).max():g}, above what float16 "
                "holds; set exchange.codec and exchange.downlink-codec to bfloat16, or lower train.lr"
            )
        return {name: half}

    def _read(self, name: str, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        return parts[name].astype(np.float32)

    def _spec(self, name: str, shape: tuple[int, ...]) -> dict[str, Spec]:
        return {name: (shape, np.dtype(np.float16))}


class _BFloat16(Codec):
    """The upper half of a float32, rounded to nearest, ties to even. It is int16, as npy lacks it."""

    def _write(self, name: str, values: np.ndarray) -> Parts:
        bits = np.ascontiguousarray(values).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        with np.errstate(over="ignore"):
            rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        # Rounding could turn the bits of NaN into a number. NaN stays NaN, and the server refuses it.
        upper = np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
        return {name: upper.view(np.int16).reshape(values.shape)}

    def _read(self, name: str, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        upper = np.ascontiguousarray(parts[name]).view(np.uint16).astype(np.uint32)
        return (upper << np.uint32(16)).view(np.float32).reshape(parts[name].shape)

    def _spec(self, name: str, shape: tuple[int, ...]) -> dict[str, Spec]:
        return {name: (shape, np.dtype(np.int16))}


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return a tensor's rows, along its first dimension, and columns; a vector or scalar is one row."""
    size = int(np.prod(shape, dtype=np.int64))
    rows = shape[0] if len(shape) > 1 else 1
    return rows, size // rows if rows else 0


class _Int8(Codec):
    feedback = True

    def _write(self, name: str, values: np.ndarray) -> Parts:
        table = values.reshape(_rows(values.shape))
        scale = np.abs(table).max(axis=1, initial=0.0) / np.float32(127)
        # A row of zeros, or of numbers too small for a scale, is sent as zeros.
        safe = np.where(scale > 0, scale, np.float32(1))[:, None]
        with np.errstate(invalid="ignore"):  # NaN: the scale says so, and the server refuses it
            levels = np.rint(table / safe).clip(-127, 127).astype(np.int8)
        return {name: levels.reshape(values.shape), name + SCALE: scale.astype(np.float32)}

    def _read(self, name: str, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        levels, scale = parts[name], parts[name + SCALE]
        table = levels.reshape(_rows(levels.shape)).astype(np.float32)
        table *= scale[:, None]
        return table.reshape(levels.shape)

    def _spec(self, name: str, shape: tuple[int, ...]) -> dict[str, Spec]:
        rows, _ = _rows(shape)
        return {
            name: (shape, np.dtype(np.int8)),
            name + SCALE: ((rows,), np.dtype(np.float32)),
        }


CODECS: Mapping[str, Codec] = {
    "float32": _Float32(),
    "float16": _Float16(),
    "bfloat16": _BFloat16(),
    "int8": _Int8(),
}


def codec_of(name: str, layers: LayerMap) -> Codec:
    """Return a codec by name, which leaves a model's buffers as they are."""
    return CODECS[name].sparing(buffer for layer in layers.layers for buffer in layer.buffers)


def written(codec: Codec, layer: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]) -> Parts:
    """Encode a layer's tensors as their change since the base; those that are not coded stay values."""
    return codec.encode(
        {
            name: np.asarray(values - base[name]) if codec.codes(name, values.dtype) else values
            for name, values in layer.items()
        }
    )


def read(
    codec: Codec, parts: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the tensors of a layer that was `written`, the same to the bit on every machine."""
    return {
        name: np.asarray(start + codec.decode(name, start, parts))
        if codec.codes(name, start.dtype)
        else parts[name]
        for name, start in base.items()
    }


def compress(
    codec: Codec,
    layers: Mapping[str, Mapping[str, np.ndarray]],
    store: LayerStore | None,
    key: str,
) -> Parts:
    """Encode a client's update, with error feedback if the codec has it.

    Parameters
    ----------
    codec : Codec
    layers : Mapping[str, Mapping[str, numpy.ndarray]]
        Δ_i by layer and tensor.
    store : LayerStore | None
        Keeps the error of each layer. An evicted error is lost, which costs a little accuracy. None
        turns error feedback off.
    key : str
        The name of the run and the client.

    Returns
    -------
    dict[str, numpy.ndarray]
        The arrays to send, by name.

    Raises
    ------
    ValueError
        If the server would refuse the update's numbers. Nothing of it is remembered then, or its error
        would spoil the client's later updates too.
    """
    parts: Parts = {}
    for update in layers.values():
        for name, values in update.items():
            try:
                check_values(name, values)
            except RefusedReply as reason:
                raise ValueError(f"the update is of no use: {reason}; lower train.lr") from None
    for layer, update in layers.items():
        if store is None or not codec.feedback:
            parts.update(codec.encode(update))
            continue
        place = f"{key}/{layer}"
        error = store.recall(place) or {}
        # A client may train other ranks than before.
        error = {n: e for n, e in error.items() if n in update and e.shape == update[n].shape}
        wanted = {
            name: values + error[name] if name in error else values
            for name, values in update.items()
        }
        sent = codec.encode(wanted)
        store.remember(
            place,
            {
                name: values - codec.decode(name, values, sent)
                for name, values in wanted.items()
                if codec.codes(name, values.dtype)
            },
        )
        parts.update(sent)
    return parts
