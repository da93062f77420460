"""The run folder and the observers that fill it and show progress."""

from layerfed.runs.folder import RunFolder, read_lines
from layerfed.runs.progress import LogLines, ProgressLine

__all__ = ["LogLines", "ProgressLine", "RunFolder", "read_lines"]
