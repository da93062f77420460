"""The run folder, its checkpoints, and the observers that write them and show progress."""

from layerfed.runs.checkpoint import Checkpoint, Checkpoints, latest_checkpoint
from layerfed.runs.files import NotWritten, lock, read_lines
from layerfed.runs.folder import RunFolder
from layerfed.runs.progress import JsonLines, LogLines, ProgressLine

__all__ = [
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
]
