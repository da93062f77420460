"""Optional libraries and missing weights: what is missing, and how to get it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from layerfed.config import ConfigError, ModelConfig
from layerfed.seeding import Stream, torch_seed

__all__ = ["loading", "new_weights", "require"]


def require(library: str, extra: str, model: str) -> Any:
    """Import a library that a plain install does not bring.

    Raises
    ------
    ConfigError
        If it is not installed, naming the extra that brings it.
    """
    try:
        return import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise ConfigError(
            f"model.name = '{model}' needs {library}, which is not installed: "
            f'pip install ".[{extra}]" in the clone of LayerFed'
        ) from None


@contextmanager
def loading(section: ModelConfig, source: str, key: str = "model.weights") -> Iterator[None]:
    """Turn what a library raises about a model that is not there into what to do about it.

    Parameters
    ----------
    section : ModelConfig
    source : str
        Hub id, tag, folder or file that is read.
    key : str
        The setting that points at it.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # libraries raise all kinds; a user can act on the reason only
        lines = str(error).strip().splitlines() or ["no more is said"]
        gated = re.search(r"gated|\b40[13]\b", str(error), re.IGNORECASE) is not None
        access = f"ask for access at https://huggingface.co/{source}, `hf auth login`, and " * gated
        raise ConfigError(
            f"cannot load '{source}' for model.name = '{section.name}': {type(error).__name__}: "
            f"{lines[0]}. To use it without a network, {access}run `hf download REPO --local-dir DIR` "
            f"where there is one (REPO is its id on huggingface.co), and set {key}=DIR"
            + "; for random weights say model.weights=random"
            * (key == "model.weights")
        ) from error


@contextmanager
def new_weights(seed: int) -> Iterator[None]:
    """Draw new weights from the run's seed, and nothing from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, Stream.HEAD))
        yield
