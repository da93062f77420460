"""Small arrays that are made once a machine, by libraries that take seconds to import.

On real devices every message starts a new process. A process often needs only a few kilobytes of what
`datasets` makes, and they are always the same. They are kept on disk, so the library is not imported
again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from logging import DEBUG
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from flwr.common.logger import log

from layerfed.config import ConfigError
from layerfed.digests import content_digest
from layerfed.exchange.store import user_cache
from layerfed.files import whole

__all__ = ["prepared"]

# The number of files kept, since a sweep over seeds leaves a file for each. The oldest go first.
MOST_FILES = 256


def prepared(
    key: Mapping[str, object], make: Callable[[], Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return named arrays, calling `make` only if this machine does not have them yet.

    Parameters
    ----------
    key : Mapping[str, object]
        Everything that the result depends on: arrays, and values with a distinct `repr`.
    make : Callable[[], Mapping[str, numpy.ndarray]]

    Notes
    -----
    Files are in the folder `prepared` of the user's cache, with checksums. A damaged file is made again.
    If nothing can be written, the arrays are made each time.
    """
    try:
        file = user_cache() / "prepared" / f"{content_digest(*_parts(key))}.npz"
    except ConfigError as error:
        log(DEBUG, "nothing can be kept: %s", error)
        return dict(make())
    try:
        with np.load(file, allow_pickle=False) as found:
            return dict(found)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        log(DEBUG, "%s cannot be read and is made again: %s", file, error)
    made = dict(make())
    try:
        _write(file, made)
    except OSError as error:
        log(DEBUG, "%s cannot be kept: %s", file, error)
    return made


def _parts(key: Mapping[str, object]) -> Iterator[str | memoryview]:
    for name, value in key.items():
        if isinstance(value, np.ndarray):
            yield f"{name}:{value.dtype}{value.shape};"
            yield np.ascontiguousarray(value).data
        else:
            yield f"{name}:{value!r};"


def _write(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file, shared=True) as beside, beside.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]
    with suppress(OSError):  # another process cleans up too
        files = sorted(file.parent.iterdir(), key=lambda f: f.stat().st_mtime)
        for old in files[:-MOST_FILES]:
            old.unlink(missing_ok=True)
