"""The common parts of the command lines: their base class, and the reading of a run's settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
from click import Context
from typer.core import TyperArgument, TyperCommand
from typer.utils import get_params_from_function

from layerfed.config.errors import ConfigError, one_line_errors
from layerfed.config.reading import load_config
from layerfed.config.run import RunConfig, run_keys

__all__ = ["App", "complete_setting", "read_settings"]


class App(typer.Typer):
    """A Typer whose commands show the help of their arguments, and print an error in one line.

    Parameters
    ----------
    mendable : tuple[type[Exception], ...]
        Errors of its commands that the user can correct, besides `ConfigError`.
    """

    def __init__(self, *, mendable: tuple[type[Exception], ...] = (), **settings: Any) -> None:
        super().__init__(**settings)
        self._kind = type("Command", (_Command,), {"mendable": mendable})

    def command(self, *args: Any, **settings: Any) -> Callable[[Any], Any]:
        """Register a command."""
        return super().command(*args, cls=self._kind, **settings)


class _Command(TyperCommand):
    mendable: tuple[type[Exception], ...] = ()

    def __init__(self, *args: Any, **settings: Any) -> None:
        # Newer versions of click overwrite the help of arguments that typer sets, so it is set again.
        super().__init__(*args, **settings)
        assert self.callback is not None
        stated = get_params_from_function(self.callback)
        for parameter in self.params:
            if isinstance(parameter, TyperArgument):
                parameter.help = stated[str(parameter.name)].default.help

    def invoke(self, ctx: Context) -> Any:
        """Run the command."""
        with one_line_errors(*self.mendable):
            return super().invoke(ctx)


def complete_setting(incomplete: str) -> list[str]:
    """Return the keys that begin with an incomplete word, for the shell's completion."""
    return [f"{key}=" for key in run_keys() if key.startswith(incomplete)]


def read_settings(settings: Sequence[str] | None, resume: Path | None = None) -> RunConfig:
    """Return the configuration that a command line describes.

    Parameters
    ----------
    settings : Sequence[str], optional
        A configuration file, or none for the defaults; then `key=value` settings that override it.
    resume : Path, optional
        A run folder, whose own configuration replaces a file.

    Raises
    ------
    ConfigError
        If the configuration cannot be run, or `resume` comes with a file or another place.
    """
    words = list(settings or ())
    file = Path(words.pop(0)) if words and "=" not in words[0] else None
    if resume is None:
        return load_config(file, words)
    if file is not None:
        raise ConfigError(f"--resume uses {resume}/config.json; leave out {file}")
    for word in words:
        if word.partition("=")[0].strip() in ("run.dir", "run.name", "run.resume"):
            raise ConfigError(f"--resume goes on in {resume}; leave out {word}")
    return load_config(resume / "config.json", [*words, f"run.resume={resume.resolve()}"])
