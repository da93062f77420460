"""Settings from files, and from `key=value` on a command line."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from layerfed.config.errors import ConfigError
from layerfed.config.run import RunConfig, text_keys
from layerfed.config.section import parse_override

__all__ = ["flatten", "load_config", "overridden", "shipped"]


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested TOML tables to dotted keys; an underscore in a key is a dash."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}".replace("_", "-")] = value
    return flat


def overridden(texts: Iterable[str]) -> dict[str, Any]:
    """Return the settings of a command line, which are `key=value` each."""
    flat: dict[str, Any] = {}
    for text in texts:
        key, value = parse_override(text)
        key = key.replace("_", "-")
        # A name stays as it is written: 1.10 is no 1.1.
        written = text.partition("=")[2].strip()
        flat[key] = written if key in text_keys() and not isinstance(value, str) else value
    return flat


def shipped(file: Path) -> Path:
    """Return a file, or the configuration of that name that comes with the package.

    That is `cifar10`, or `conf/cifar10.toml`, as the documents write it, in a folder that is no clone.
    """
    if file.is_file():
        return file
    name = file
    if file.parts[:1] == ("conf",) and file.suffix == ".toml":
        name = file.relative_to("conf").with_suffix("")
    return file if name.suffix else packaged(str(name)) or file


def packaged(name: str) -> Path | None:
    """Return the configuration of a name that comes with the package, if there is one."""
    package = Path(__file__).resolve().parents[1]
    places = (folder / "conf" / f"{name}.toml" for folder in (package, package.parent))
    return next((place for place in places if place.is_file()), None)


def load_config(file: Path | None, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a configuration file, or the defaults, and apply `key=value` overrides."""
    flat: dict[str, Any] = {}
    if file is not None:
        try:
            file = shipped(file)
            text = file.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise ConfigError(f"cannot read configuration {file}: {error.strerror}") from None
        except UnicodeError as error:
            raise ConfigError(f"{file} is not UTF-8: {error}; convert it") from None
        try:
            table = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits
            kind = "JSON" if file.suffix == ".json" else "TOML"
            raise ConfigError(f"{file} is not valid {kind}: {error}") from None
        if not isinstance(table, dict):
            raise ConfigError(f"{file} holds no table of settings, but a {type(table).__name__}")
        flat = flatten(table)
    return RunConfig.from_flat(flat | overridden(overrides))
