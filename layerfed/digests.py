"""Digests: the names of layers, of a pretrained base, and of what is kept on a disk.

All are BLAKE2b of 16 bytes, written as 32 hex digits. Stores, caches and checkpoints lie under these
names for years: a digest of given content never changes.
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
    """Return the digest of some text or bytes, the same whether in one part or in many."""
    return _digest(parts)


def digest(tensors: Mapping[str, np.ndarray | Tensor]) -> str:
    """Return the content digest of a layer, over names, dtypes, shapes and bytes.

    The same for a torch tensor and a numpy array of equal content, in any order of the mapping, of
    memory, or of bytes in a number.
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
            # As bytes, since numpy lacks bfloat16 and others.
            content = flat.view(torch.uint8).numpy()
        yield f"{name}:{kind}:{tuple(value.shape)};"
        yield content.data


def _digest(parts: Iterable[str | bytes | memoryview]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part.encode() if isinstance(part, str) else part)
    return state.hexdigest()
