"""The errors that a user sees in one line, and the place that turns them into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "EXPECTED",
    "EXTRAS",
    "ConfigError",
    "Failed",
    "MissingExtra",
    "naming_extras",
    "one_line_errors",
]

# As Unix commands have it: 2 is a wrong call, 1 a right one that did not work.
STATUS = {"error": 2, "failed": 1}


class ConfigError(ValueError):
    """A setting that cannot be run; the message names the key, the value and what is allowed."""


class Failed(RuntimeError):
    """Work that was begun and cannot be finished; the message says why, and what to do."""


EXPECTED: tuple[type[Exception], ...] = (ConfigError, Failed)


@contextmanager
def one_line_errors(*mendable: type[Exception]) -> Iterator[None]:
    """End the process with one line on standard error in place of a traceback.

    Parameters
    ----------
    mendable : type[Exception]
        Errors that are the user's to mend here, beside `ConfigError`.

    Raises
    ------
    SystemExit
        Of status 2 for what a user can mend, a line that begins with `error:`; of status 1 for what has
        failed, `failed:`.
    """
    try:
        with naming_extras():
            yield
    except EXPECTED + mendable as error:
        from rich.console import Console
        from rich.markup import escape

        word = "failed" if isinstance(error, Failed) else "error"
        line = f"[bold red]{word}:[/] {escape(str(error))}"
        Console(stderr=True).print(line, soft_wrap=True)
        raise SystemExit(STATUS[word]) from None


# The extra that brings a library, by the name that is imported.
EXTRAS = {
    "datasets": "data",
    "dp_accounting": "privacy",
    "flwr_datasets": "data",
    "highspy": "solvers",
    "httpx": "deploy",
    "matplotlib": "report",
    "open_clip": "clip",
    "PIL": "images",
    "pulp": "solvers",
    "pyarrow": "data",
    "ray": "simulation",
    "starlette": "deploy",
    "timm": "images",
    "transformers": "text",
    "uvicorn": "deploy",
}


class MissingExtra(ConfigError):
    """A library that a plain install does not bring; the message names the command that does."""


@contextmanager
def naming_extras(what: str = "this") -> Iterator[None]:
    """Turn a missing optional library into one line that names the extra to install.

    Parameters
    ----------
    what : str
        What needs the library, as the subject of the message.

    Raises
    ------
    MissingExtra
        In place of the `ModuleNotFoundError` of a library in `EXTRAS`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        # A distribution that `importlib.metadata` misses has dashes in its name.
        library = (error.name or "").partition(".")[0].replace("-", "_")
        if library not in EXTRAS:
            raise
        raise MissingExtra(
            f"{what} needs {library}, which is not installed: "
            f'pip install ".[{EXTRAS[library]}]" in the clone of LayerFed'
        ) from None
