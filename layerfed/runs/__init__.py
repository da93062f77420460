"""The run folder, its checkpoints, and the observers that write them and show progress."""

from layerfed.runs.checkpoint import (
    BestModel,
    Checkpoint,
    Checkpoints,
    latest_checkpoint,
    restore_best,
)
from layerfed.runs.files import NotWritten, lock, read_lines
from layerfed.runs.folder import RunFolder
from layerfed.runs.progress import JsonLines, LogLines, ProgressLine

__all__ = [
    "BestModel",
    "Checkpoint",
    "Checkpoints",
    "JsonLines",
    "LogLines",
    "NotWritten",
    "ProgressLine",
    "RunFolder",
    "latest_checkpoint",
    "lock",
    "read_lines",
    "restore_best",
]
