"""Arrays that are made once on a machine, by libraries that take seconds to import.

On real devices every message starts a new process. What a process needs of `datasets` is often a few
kilobytes that are always the same: these are kept, and the library is imported no more.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from logging import DEBUG
from pathlib import Path
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np
from flwr.common.logger import log

from layerfed.exchange.store import user_cache

__all__ = ["prepared"]

# The least recently made go first: a sweep over seeds leaves a file for each.
MOST_FILES = 256


def prepared(
    key: Mapping[str, object], make: Callable[[], Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return named arrays, made by `make` unless this machine has them.

    Parameters
    ----------
    key : Mapping[str, object]
        All that the result depends on: arrays, and what `repr` tells apart.
    make : Callable[[], Mapping[str, numpy.ndarray]]

    Notes
    -----
    They lie in the folder `prepared` of the user's cache, each file with checksums; one that is damaged
    is made anew, and where nothing can be written they are made each time.
    """
    file = user_cache() / "prepared" / f"{_digest(key)}.npz"
    try:
        with np.load(file, allow_pickle=False) as found:
            return dict(found)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        log(DEBUG, "%s cannot be read and is made anew: %s", file, error)
    made = dict(make())
    try:
        _write(file, made)
    except OSError as error:
        log(DEBUG, "%s cannot be kept: %s", file, error)
    return made


def _digest(key: Mapping[str, object]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for name, value in key.items():
        if isinstance(value, np.ndarray):
            state.update(f"{name}:{value.dtype}{value.shape};".encode())
            state.update(np.ascontiguousarray(value).data)
        else:
            state.update(f"{name}:{value!r};".encode())
    return state.hexdigest()


def _write(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    beside = file.with_name(f"{file.name}.{uuid4().hex}.tmp")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with beside.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
    with suppress(OSError):  # another process cleans up too
        files = sorted(file.parent.iterdir(), key=lambda f: f.stat().st_mtime)
        for old in files[:-MOST_FILES]:
            old.unlink(missing_ok=True)
