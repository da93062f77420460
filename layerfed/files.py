"""Writing files so that they are either complete or unchanged, whatever happens; folders nearly so."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import numpy as np

__all__ = ["create", "flush", "save_tensors", "whole"]


@contextmanager
def whole(place: Path, *, shared: bool = False, durable: bool = False) -> Iterator[Path]:
    """Yield a path beside `place` for a file or a folder, and rename it to `place` afterwards.

    If an error is raised, the temporary file is removed: on a full disk it would take the room that the
    next file needs. The temporary file of a killed process is removed by the next write of that name. A
    process that is killed just as it replaces a folder leaves the old one beside it, as `.NAME.old`.

    Parameters
    ----------
    place : Path
        The final path, in a folder that exists. A file there is replaced, and so is a folder with all
        its content.
    shared : bool (default: False)
        Whether several processes may write `place` at once. Each then uses a temporary name of its own,
        and the caller removes the files of killed processes.
    durable : bool (default: False)
        Whether the content and the rename must be on the disk at the end of the context.
    """
    beside = place.with_name(f".{place.name}{f'.{uuid4().hex}' if shared else ''}.tmp")
    _remove(beside)
    try:
        yield beside
        if durable:
            for path in (*beside.rglob("*"), beside):
                flush(path)
        if place.is_dir():
            aside = place.with_name(f".{place.name}.old")
            _remove(aside)
            os.replace(place, aside)
            try:
                os.replace(beside, place)
            except OSError:
                os.replace(aside, place)
                raise
            _remove(aside)
        else:
            os.replace(beside, place)
    except BaseException:
        with suppress(OSError):
            _remove(beside)
        raise
    if durable:
        flush(place.parent)


def create(file: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a new file with its final mode from the first moment.

    Raises
    ------
    FileExistsError
        If the file exists already; it stays unchanged.
    """
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def save_tensors(
    file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a `.safetensors` file, one tensor after the other; use it inside `whole`.

    The library's own function needs all tensors in memory at once, and a mapping may make each of them
    when it is read.
    """
    shapes = {name: (values.dtype, values.shape) for name, values in tensors.items()}
    # The largest types first, so that each tensor begins at a multiple of its elements' size.
    order = sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in order:
        dtype, shape = shapes[name]
        end = start + dtype.itemsize * math.prod(shape)
        code = "BOOL" if dtype.kind == "b" else f"{dtype.kind.upper()}{8 * dtype.itemsize}"
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            native = shapes[name][0].newbyteorder("<")
            values = np.ascontiguousarray(tensors[name], dtype=native)
            stream.write(values.reshape(-1).view(np.uint8).data)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have a file or folder on the disk, which a power cut does not undo."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
