"""Optional libraries: which extra of the package brings each, and the error where one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from layerfed.config import ConfigError

__all__ = ["EXTRAS", "MissingExtra", "naming_extras"]

#: The extra that brings a library, by the name that is imported.
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
