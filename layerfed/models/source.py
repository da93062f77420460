"""Errors for missing libraries and missing weights, which say how to get them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerfed.config import ConfigError, ModelConfig
from layerfed.config.errors import naming_extras
from layerfed.config.seeding import Stream, torch_seed

__all__ = ["FILES", "loading", "new_weights", "require", "shipped_file", "shipped_vit"]

# Some of the oldest repositories have no owner.
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

# How names of files with weights end, and no hub id does.
FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def require(library: str, model: str) -> Any:
    """Import a library that a plain installation does not include.

    Raises
    ------
    MissingExtra
        If the library is not installed. The message names the extra that includes it.
    """
    with naming_extras(f"model.name = '{model}'"):
        return import_module(library)


def shipped_file(what: str, name: str) -> Path:
    """Return a file of `layerfed_assets`, which Flower's hub and its app bundle leave out.

    Parameters
    ----------
    what : str
        The setting that needs it, for the message.
    name : str
        The file's name.

    Raises
    ------
    ConfigError
        If this environment has no such file. The message says how to get it.
    """
    try:
        file = Path(str(import_module("layerfed_assets").__file__)).with_name(name)
        there = file.exists()
    except ModuleNotFoundError:
        file, there = Path("layerfed_assets", name), False
    if not there:
        raise ConfigError(
            f"{what} needs {file}, which is not here, since Flower's app bundles and its hub leave out "
            "binary files: pip install layerfed from PyPI or a clone in this environment, or take "
            "other data (task.name=custom) and another model (model.name)"
        )
    return file


def shipped_vit(classes: int) -> nn.Module:
    """Return the shipped architecture with random weights.

    Raises
    ------
    ConfigError
        If this environment lacks it, as for `shipped_file`.
    """
    shipped_file("model.name = 'layerfed/vit'", "vit.py")
    net: nn.Module = import_module("layerfed_assets").backbone(num_classes=classes)
    return net


@contextmanager
def loading(
    section: ModelConfig, source: str, key: str = "model.weights", repository: str | None = None
) -> Iterator[None]:
    """Turn a library's error about a missing model into an error that says what to do.

    Parameters
    ----------
    section : ModelConfig
    source : str
        The hub id, tag, folder or file that is read.
    key : str
        The setting that names it.
    repository : str, optional
        The hub id of a tag; empty if the tag is not on the hub.
    """
    there = os.path.exists(os.path.expanduser(source))
    if not there and (source.startswith(("/", ".", "~")) or source.endswith(FILES)):
        raise ConfigError(
            f"{key} names '{source}', which does not exist; give a folder, a file or a hub id"
        )
    if repository is None:
        named = HUB_ID.fullmatch(source) and source != "random" and not there
        repository = source if named else ""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # libraries raise many types; the user needs the reason only
        reason = (str(error).strip().splitlines() or ["no more is said"])[0].rstrip(".")
        no_path = ", which is no file or folder here," * bool(repository)
        raise ConfigError(
            f"cannot load '{source}'{no_path} for model.name = '{section.name}': "
            f"{type(error).__name__}: {reason}. {_advice(section, repository, key, str(error))}"
        ) from error


def _advice(section: ModelConfig, repository: str, key: str, error: str) -> str:
    # Models of transformers need the configuration even with random weights.
    drawn = key == "model.weights" and section.family != "transformers"
    random = "; for random weights set model.weights=random" * drawn
    if not repository:
        return f"Give a folder as `hf download` leaves it ({key}){random}"
    gated = re.search(r"gated|\b40[13]\b", error, re.IGNORECASE) is not None
    access = f"ask for access at https://huggingface.co/{repository}, `hf auth login`, and " * gated
    only, value = "", "DIR"
    if key == "model.name":  # with random weights, only the configuration is needed
        only, value = " --include '*.json'", f"{section.family}/DIR"
    return (
        f"To use it without a network, {access}run `hf download {repository}{only} --local-dir DIR` "
        f"on a machine with one, and set {key}={value}{random}"
    )


@contextmanager
def new_weights(seed: int, stream: Stream = Stream.HEAD) -> Iterator[None]:
    """Draw new weights from the run's seed, and leave the global generator unchanged."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also seed all GPUs.
        torch.default_generator.manual_seed(torch_seed(seed, stream))
        yield
