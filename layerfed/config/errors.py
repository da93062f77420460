"""Errors that a user sees in one line, and the contexts that print them."""

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

# Exit status, as for other Unix commands: 2 for a wrong call, 1 for a correct call that failed.
STATUS = {"error": 2, "failed": 1}


class ConfigError(ValueError):
    """Error for a setting that cannot be run; the message names key, value and what is allowed."""


class Failed(RuntimeError):
    """Error for work that began and cannot be finished; the message says why, and what to do."""


EXPECTED: tuple[type[Exception], ...] = (ConfigError, Failed)


@contextmanager
def one_line_errors(*mendable: type[Exception]) -> Iterator[None]:
    """Turn an expected error into one line on standard error and an exit status.

    Parameters
    ----------
    mendable : type[Exception]
        Errors that the user can correct here, besides `ConfigError`.

    Raises
    ------
    SystemExit
        With status 2 and a line `error: …` if the user can correct the error; with status 1 and a line
        `failed: …` if work failed.
    """
    try:
        with naming_extras():
            yield
    except EXPECTED + mendable as error:
        from rich.console import Console
        from rich.markup import escape

        word = "failed" if isinstance(error, Failed) else "error"
        said = f"a file lacks the entry {error}" if isinstance(error, KeyError) else str(error)
        line = f"[bold red]{word}:[/] {escape(said)}"
        Console(stderr=True, emoji=False).print(line, soft_wrap=True)
        raise SystemExit(STATUS[word]) from None


# The extra that installs a library, by the library's import name.
EXTRAS = {
    "bitsandbytes": "quantised",
    "datasets": "data",
    "dp_accounting": "privacy",
    "flwr_datasets": "data",
    "highspy": "solvers",
    "httpx": "deploy",
    "huggingface_hub": "data",
    "matplotlib": "report",
    "mlflow": "mlflow",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "open_clip": "clip",
    "peft": "lora",
    "PIL": "images",
    "pulp": "solvers",
    "pyarrow": "data",
    "ray": "simulation",
    "scipy": "report",
    "starlette": "deploy",
    "tensorboard": "tensorboard",
    "timm": "images",
    "torchvision": "images",
    "trackio": "trackio",
    "transformers": "text",
    "uvicorn": "deploy",
    "wandb": "wandb",
}


class MissingExtra(ConfigError):
    """Error for an optional library that is not installed; the message names the command for it."""


@contextmanager
def naming_extras(what: str = "this") -> Iterator[None]:
    """Turn a missing optional library into one line that names the extra to install.

    Parameters
    ----------
    what : str
        The subject of the message: the thing that needs the library.

    Raises
    ------
    MissingExtra
        If a library in `EXTRAS` is missing, in place of `ModuleNotFoundError`.
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
