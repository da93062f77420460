"""Digests: the names of layers, of a pretrained base, and of files in stores and caches.

All are BLAKE2b of 16 bytes, written as 32 hex digits. The digest of a given content must never change,
because stores, caches and checkpoints keep these names for years.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["content_digest", "digest", "fingerprint"]


def content_digest(*parts: str | bytes | memoryview) -> str:
    """Return the digest of text or bytes; it does not depend on how they are split into parts."""
    return _digest(parts)


def digest(tensors: Mapping[str, np.ndarray | Tensor]) -> str:
    """Return the content digest of a layer, over names, dtypes, shapes and bytes.

    A torch tensor and a numpy array of equal content have the same digest. It does not depend on the
    order of the mapping, of memory, or of the bytes in a number.
    """
    return _digest(_parts(tensors))


def fingerprint(digests: Mapping[str, str]) -> str:
    """Return the identity of a pretrained base: a digest of all its layers' digests."""
    return content_digest("".join(f"{name}:{value};" for name, value in sorted(digests.items())))


def _parts(tensors: Mapping[str, np.ndarray | Tensor]) -> Iterator[str | memoryview]:
    for name in sorted(tensors):
        value = tensors[name]
        if isinstance(value, np.ndarray):
            native = value.dtype.newbyteorder("=")
            kind = str(native)
            content = np.ascontiguousarray(value, dtype=native).reshape(-1).view(np.uint8)
        else:
            import torch  # a process that holds a tensor has imported it

            kind = str(value.dtype).removeprefix("torch.")
            flat = value.detach().cpu().contiguous().view(-1)
            # As bytes, since numpy lacks bfloat16 and other types.
            content = flat.view(torch.uint8).numpy()
        yield f"{name}:{kind}:{tuple(value.shape)};"
        yield content.data


def _digest(parts: Iterable[str | bytes | memoryview]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part.encode() if isinstance(part, str) else part)
    return state.hexdigest()
