"""Write and read a run folder's files; a failed write leaves the previous content unchanged."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.numpy import save_file

from layerfed.config import ConfigError

__all__ = [
    "NotWritten",
    "append_line",
    "lock",
    "read_lines",
    "write_json",
    "write_lines",
    "write_tensors",
]


class NotWritten(RuntimeError):
    """Error for a file that could not be written, e.g. on a full disk; its old content is unchanged."""

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
    return taken


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


def append_line(file: Path, row: Mapping[str, Any]) -> None:
    """Append a line to a `.jsonl` file, either whole or not at all.

    Raises
    ------
    NotWritten
        If the line cannot be written.
    """
    rest = memoryview((json.dumps(row) + "\n").encode())
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
    _replace(file, json.dumps(content, indent=2) + "\n")


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write a `.jsonl` file, replacing the old one.

    Raises
    ------
    NotWritten
        If the file cannot be written.
    """
    _replace(file, "".join(json.dumps(row) + "\n" for row in rows))


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a `.safetensors` file, replacing the old one.

    Raises
    ------
    NotWritten
        If the file cannot be written.
    """
    beside = file.with_name(file.name + ".tmp")
    try:
        save_file({name: np.asarray(t, order="C") for name, t in tensors.items()}, beside)
        os.replace(beside, file)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise NotWritten(file, error) from error


def _replace(file: Path, text: str) -> None:
    beside = file.with_name(file.name + ".tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, file)
    except OSError as error:
        # On a full disk, half a file would take the space that the next one needs.
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise NotWritten(file, error) from error
