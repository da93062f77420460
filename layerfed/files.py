"""Files and folders that are whole or untouched, whatever happens while they are written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import numpy as np

__all__ = ["create", "save_tensors", "whole"]


@contextmanager
def whole(place: Path, *, shared: bool = False, flush: bool = False) -> Iterator[Path]:
    """Yield a path beside `place` to write a file or a folder at, then rename it to `place`.

    Nothing is left beside `place` if an error is raised: on a full disk, half a file would take the room
    that the next one needs. Half a file of a killed process goes with the next one of that name.

    Parameters
    ----------
    place : Path
        Its folder exists. What lies there is replaced, a folder with all its content.
    shared : bool (default: False)
        Whether several processes may write `place` at once. Each then writes a file of its own name, and
        the caller clears away what killed ones leave.
    flush : bool (default: False)
        Whether the content and the rename are on the disk when this ends.
    """
    beside = place.with_name(f".{place.name}{f'.{uuid4().hex}' if shared else ''}.tmp")
    _remove(beside)
    try:
        yield beside
        if flush:
            for path in (*beside.rglob("*"), beside):
                _flush(path)
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        os.replace(beside, place)
    except BaseException:
        with suppress(OSError):
            _remove(beside)
        raise
    if flush:
        _flush(place.parent)


def create(file: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a new file that has its final mode from the first moment.

    Raises
    ------
    FileExistsError
        If there is one already; it is untouched.
    """
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def save_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a `.safetensors` file; use it inside `whole`."""
    from safetensors.numpy import save_file

    save_file({name: np.asarray(values, order="C") for name, values in tensors.items()}, file)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
