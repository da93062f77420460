"""Write and read a run folder's files; a failed write leaves the previous content unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from layerfed.config import ConfigError
from layerfed.config.errors import Failed
from layerfed.files import save_tensors, whole

__all__ = [
    "NotWritten",
    "append_line",
    "lock",
    "read_json",
    "read_lines",
    "write_json",
    "write_lines",
    "write_tensors",
]


class NotWritten(Failed):
    """A file could not be written, as when the disk is full; what was in its place is untouched."""

    def __init__(self, file: Path, error: Exception) -> None:
        self.reason = getattr(error, "strerror", None) or str(error)
        super().__init__(
            f"{file} cannot be written: {self.reason}; mend that, and resume with --resume {file.parent}"
        )


def lock(folder: Path) -> FileLock:
    """Lock a run folder for this process, until the lock is released or the process has ended.

    A ServerApp may outlive the SuperLink that started it for a while. If the run were resumed meanwhile,
    two processes would write to the folder.

    Raises
    ------
    ConfigError
        If another process holds the lock, or the path is no folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"run.resume = '{folder}' is no run folder of this machine")
    taken = FileLock(folder / ".lock", timeout=0)
    try:
        taken.acquire()
    except Timeout:
        raise ConfigError(
            f"run.resume = '{folder}' is being written by a run; wait for its end"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}") from None
    return taken


def read_json(file: Path) -> dict[str, Any]:
    """Return the content of a `.json` file.

    Raises
    ------
    OSError, ValueError
        If the file is missing or damaged; a `ValueError` names it.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged: it holds no object")
    return found


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read a `.jsonl` file, without a last line that a crash cut short.

    Raises
    ------
    ValueError
        If a line before the last is damaged, which a crash cannot explain.
    """
    rows: list[dict[str, Any]] = []
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{file.name}, line {number} is damaged: {error}") from None
    return rows


def append_line(file: Path, *rows: Mapping[str, Any]) -> None:
    """Append lines to a `.jsonl` file, all of them or nothing.

    Raises
    ------
    NotWritten
        If the line cannot be written.
    """
    rest = memoryview("".join(json.dumps(row) + "\n" for row in rows).encode())
    try:
        # There is no buffer, since closing the file would try to write a buffer again.
        with file.open("ab", buffering=0) as stream:
            size = stream.tell()
            try:
                while rest:
                    rest = rest[stream.write(rest) :]
            except OSError:
                with suppress(OSError):
                    stream.truncate(size)
                raise
    except OSError as error:
        raise NotWritten(file, error) from error


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a `.json` file, replacing the old one.

    Raises
    ------
    NotWritten
        If the file cannot be written.
    """
    with _written(file) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write a `.jsonl` file, replacing the old one.

    Raises
    ------
    NotWritten
        If the file cannot be written.
    """
    with _written(file) as beside:
        beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tensors(
    file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a `.safetensors` file, replacing the old one; its header holds the metadata.

    Raises
    ------
    NotWritten
        If the file cannot be written.
    """
    with _written(file) as beside:
        save_tensors(beside, tensors, metadata)


@contextmanager
def _written(file: Path) -> Iterator[Path]:
    try:
        with whole(file) as beside:
            yield beside
    except (OSError, SafetensorError) as error:
        raise NotWritten(file, error) from error
