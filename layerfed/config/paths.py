"""Paths among the settings, which mean the same in any folder once they are absolute."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerfed.config.errors import ConfigError

__all__ = ["WEIGHTS", "absolute", "expanded"]

# What `model.weights` says without naming a place.
WEIGHTS = ("embedded", "pretrained", "random")


def absolute(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with absolute paths.

    What may also be a name, such as a hub id, is a path if there is a file or folder of that name here.
    """
    found = dict(flat)
    for key in ("task.data", "model.weights", "model.tokenizer"):
        if str(flat.get(key)) not in WEIGHTS and os.path.exists(path := _path(flat.get(key))):
            found[key] = path
    family, _, name = str(flat.get("model.name", "")).partition("/")
    if family == "transformers" and os.path.exists(path := _path(name)):
        found["model.name"] = f"{family}/{path}"
    if flat.get("exchange.store") not in ("", "memory", None):
        found["exchange.store"] = _path(flat["exchange.store"])
    found["run.dir"] = _path(flat.get("run.dir") or "runs")
    return found


def _path(text: object) -> str:
    """Return an absolute path; empty for an empty text."""
    return os.path.abspath(os.path.expanduser(str(text))) if text else ""


def expanded(path: str) -> Path:
    """Return a path with its `~` or `~user` replaced.

    Raises
    ------
    ConfigError
        If there is no such user, since a folder of that name would be made in the current one.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ConfigError(
            f"'{path}': there is no user '{path[1:].partition('/')[0]}' on this machine; give the "
            f"folder in full, or as ./{path} if its name begins with ~"
        )
    return Path(found)
