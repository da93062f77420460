"""Tensors in messages: serialised late, read without a copy, and checked before use."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord

from layerfed.flower_compat import SType, passes_as_array

__all__ = [
    "BaseArrays",
    "LazyArray",
    "LiveArray",
    "RefusedReply",
    "carried_bytes",
    "decode",
    "encode",
    "moved_bytes",
    "printable",
    "record_of",
]

# Largest size of the npy format's header.
MAX_HEADER = 4096
# Largest number of characters of a reason; the rest is cut.
MAX_REASON = 500


class RefusedReply(ValueError):
    """Error for a client's reply that must not be used; the message gives the reason in one line.

    Parameters
    ----------
    reason : str
        The reason, which may quote any part of the reply. It is made printable, since it is logged and
        written to the run folder.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason))


def printable(text: str) -> str:
    """Return an untrusted text as one line of printable characters, cut at `MAX_REASON`."""
    shown = "".join(c if c.isprintable() else " " for c in text[:MAX_REASON])
    return shown if len(text) <= MAX_REASON else f"{shown} …"


@passes_as_array
class LiveArray(Array):
    """Flower's `Array`, but serialised only if it leaves the machine.

    Flower serialises an array when a record is made, and reads it again when it is used. Within one
    process these are two copies for nothing. Between processes of one machine Ray moves the numpy array
    itself, without a copy.

    Parameters
    ----------
    values : numpy.ndarray
        The array, which is not copied. It must not change while the message exists.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.dtype = str(values.dtype)
        self.shape = tuple(values.shape)
        self.stype = SType.NUMPY
        self.values = values.view()
        self.values.flags.writeable = False
        self.travelled = False
        """Whether the array came from another process."""
        self._data: bytes | None = None

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The npy bytes, row-major. They are made at the first use and shared by all messages."""
        if self._data is None:
            values = np.asarray(self.values, order="C")
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                header, np.lib.format.header_data_from_array_1_0(values)
            )
            content = values.reshape(-1).view(np.uint8).data
            self._data = b"".join((header.getvalue(), content))
            # The values become a view of these bytes, so that there is no second copy.
            self.values = np.frombuffer(self._data, values.dtype, offset=header.tell()).reshape(
                values.shape
            )
        return self._data

    def numpy(self) -> np.ndarray:
        """Return a copy of the values."""
        return self.values.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        # With pickle's out-of-band buffers, as Ray uses them, the values are not copied.
        return _arrived, (self.values,)


@passes_as_array
class LazyArray(LiveArray):
    """An array that is read from where it is held each time, and never kept.

    Parameters
    ----------
    read : Callable[[], numpy.ndarray]
    dtype : numpy.dtype
    shape : tuple[int, ...]
    """

    def __init__(
        self, read: Callable[[], np.ndarray], dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> None:
        self.dtype, self.shape, self.stype = str(dtype), shape, SType.NUMPY
        self.travelled = False
        self._data = None
        self._read = read

    @property
    def values(self) -> np.ndarray:
        """The array, read-only."""
        values = self._read().view()
        values.flags.writeable = False
        return values

    @values.setter
    def values(self, _: np.ndarray) -> None:
        """Keep nothing: what was serialised can be read again."""


class BaseArrays(ArrayRecord):
    """A pretrained base's arrays, with the digests that its checkpoint's layers have.

    Parameters
    ----------
    digests : Mapping[str, str]
    """

    def __init__(self, digests: Mapping[str, str]) -> None:
        super().__init__()
        self.digests = dict(digests)


def _arrived(values: np.ndarray) -> LiveArray:
    array = LiveArray(values)
    array.travelled = True
    return array


def encode(values: np.ndarray) -> Array:
    """Return an array for a message."""
    return LiveArray(values)


def record_of(tensors: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Return tensors as a record for a message."""
    record = ArrayRecord()
    for name, values in tensors.items():
        record[name] = encode(values)  # one by one: Flower's constructor would serialise them
    return record


def carried_bytes(arrays: Iterable[Array]) -> int:
    """Return the bytes of elements that a network would carry for some arrays."""
    return sum(a.values.nbytes if isinstance(a, LiveArray) else _content(a.data) for a in arrays)


def _content(data: bytes) -> int:
    # An npy file states the length of its header. The statement may be wrong; this is only a count.
    return max(0, len(data) - 10 - int.from_bytes(data[8:10], "little"))


def moved_bytes(arrays: Iterable[Array]) -> int:
    """Return the bytes of the arrays that came from another process."""
    return carried_bytes(a for a in arrays if not isinstance(a, LiveArray) or a.travelled)


def decode(array: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return an array as a view of the expected shape and dtype, without a copy.

    The npy header is compared with the expectation before anything is allocated. So a forged header can
    neither allocate memory nor bring in an object array.

    Raises
    ------
    RefusedReply
        If the bytes are not exactly an array of that shape and dtype.
    """
    if isinstance(array, LiveArray):
        if array.values.shape != shape or array.values.dtype != dtype:
            raise RefusedReply(
                f"an array of {array.values.dtype}{array.values.shape} where {dtype}{shape} is due"
            )
        return array.values
    expected = math.prod(shape) * dtype.itemsize
    if array.stype != SType.NUMPY or len(array.data) > expected + MAX_HEADER:
        raise RefusedReply(f"an array of {len(array.data)} bytes where {expected} are due")
    stream = io.BytesIO(array.data[:MAX_HEADER])
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"npy version {version}")
        header = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:
        # NumPy parses the header as Python, so a forged one can raise nearly any error, such as
        # TypeError, tokenize.TokenError or RecursionError.
        raise RefusedReply(f"an array that cannot be read ({error})") from None
    if header != (shape, False, dtype):
        raise RefusedReply(f"an array of {header[2]}{header[0]} where {dtype}{shape} is due")
    if len(array.data) != stream.tell() + expected:
        raise RefusedReply("an array whose bytes do not match its header")
    return np.frombuffer(array.data, dtype, offset=stream.tell()).reshape(shape)
