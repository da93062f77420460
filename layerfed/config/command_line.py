"""What command lines that start a run have in common: a file, then key=value, or a run to go on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from layerfed.config.run import ConfigError, RunConfig, load_config

__all__ = ["read_settings"]


def read_settings(settings: Sequence[str] | None, resume: Path | None = None) -> RunConfig:
    """Return the configuration that a command line describes.

    Parameters
    ----------
    settings : Sequence[str], optional
        A configuration file, or none for the defaults; then `key=value` settings that override it.
    resume : Path, optional
        A run folder, whose own configuration takes the place of a file.

    Raises
    ------
    ConfigError
        If it cannot be run, or names a file beside `resume`.
    """
    words = list(settings or ())
    file = Path(words.pop(0)) if words and "=" not in words[0] else None
    if resume is None:
        return load_config(file, words)
    if file is not None:
        raise ConfigError(f"--resume goes on with {resume}/config.json; leave out {file}")
    return load_config(resume / "config.json", [*words, f"run.resume={resume.resolve()}"])
