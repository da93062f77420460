"""The run folder, checkpoints, and the observers that fill them and show progress."""

from layerfed.runs.checkpoint import Checkpoint, Checkpoints, latest_checkpoint
from layerfed.runs.folder import RunFolder, read_lines
from layerfed.runs.progress import LogLines, ProgressLine

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "LogLines",
    "ProgressLine",
    "RunFolder",
    "latest_checkpoint",
    "read_lines",
]
