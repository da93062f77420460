"""The base of all sections of settings: strict reading, and helpers for clear errors."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Sequence
from datetime import date, time
from difflib import get_close_matches
from importlib import import_module
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from layerfed.config.errors import ConfigError, naming_extras

__all__ = [
    "ConfigError",
    "DeviceName",
    "PlugIn",
    "RunName",
    "Section",
    "Switch",
    "explain",
    "imported",
    "is_text",
    "nearest",
    "nearest_key",
    "parse_override",
    "section_keys",
    "words",
]


def words(text: str) -> tuple[str, ...]:
    """Return what a setting lists, separated by commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean …?" with the known word nearest to an unknown one, or an empty text."""
    found = get_close_matches(word, list(known), 1)
    return f"; did you mean {found[0]}?" if found else ""


SCALARS = ("str", "int", "float", "bool")
WORDS = {"yes": True, "true": True, "on": True, "1": True}
WORDS |= {"no": False, "false": False, "off": False, "0": False}


def _switch(value: Any) -> Any:
    return value if isinstance(value, float) else WORDS.get(str(value).lower(), value)


def _device(value: Any) -> Any:
    name = re.sub(r"^gpu\b", "cuda", value) if isinstance(value, str) else value
    if not isinstance(name, str) or not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise PydanticCustomError("device", "auto, cpu, mps, cuda (or gpu), or cuda:1")
    return name


def _run_name(value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch(r"[\w.-]*", value):
        raise PydanticCustomError("name", "letters, digits, '.', '_' and '-'")
    return value


def _plug_in(value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch(r"[\w-]+|\w+(\.\w+)*:\w+", value):
        raise PydanticCustomError("name", "a name, or one of your own as module:Class")
    return value


def imported(name: str, key: str) -> Any:
    """Return what `module:attribute` names.

    Parameters
    ----------
    name : str
    key : str
        The setting that has this value, for the message.

    Raises
    ------
    ConfigError
        If there is no such module, or it has no such attribute.
    """
    module, _, attribute = name.partition(":")
    try:
        with naming_extras(f"{key} = '{name}'"):
            return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{key} = '{name}' cannot be imported: {error}; install its module on the server and on "
            "every client, or put it in the current folder of `layerfed` or a folder of PYTHONPATH"
        ) from None


PlugIn = Annotated[str, BeforeValidator(_plug_in)]
"""The name of a task or strategy, or the place of a user's own one: `module:Class`."""
Switch = Annotated[bool, BeforeValidator(_switch)]
"""True or false; yes, no, on, off, 1 and 0 are accepted too."""
DeviceName = Annotated[str, BeforeValidator(_device)]
"""torch's name of a device, or auto; gpu means cuda."""
RunName = Annotated[str, BeforeValidator(_run_name)]
"""The name of a run folder."""


def is_text(annotation: Any) -> bool:
    """Return whether a setting is text, perhaps with a rule, or None."""
    return any(
        part is str or get_args(part)[:1] == (str,)
        for part in get_args(annotation) or (annotation,)
    )


class Section(BaseModel):
    """A section of settings. Unknown keys, infinities, and "3" or true for a number are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        strict=True,
        populate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),
    )

    @model_validator(mode="before")
    @classmethod
    def _numbers_as_text(cls, given: Any) -> Any:
        """Take a number for a setting that is text: a run or a column may be called 2024."""
        if not isinstance(given, dict):
            return given
        text = {name for name, field in cls.model_fields.items() if is_text(field.annotation)}
        return {
            key: str(value)
            if type(value) in (int, float) and key.replace("-", "_") in text
            else value
            for key, value in given.items()
        }


def explain(error: ValidationError, keys: Sequence[str], prefix: str = "") -> str:
    """Turn pydantic's findings into one line that tells the user what to change.

    Parameters
    ----------
    error : pydantic.ValidationError
    keys : Sequence[str]
        The known keys.
    prefix : str
        The prefix of the checked keys, for example `strategy.`.
    """
    lines = []
    for finding in error.errors():
        key = prefix + ".".join(str(part) for part in finding["loc"])
        if finding["type"] == "extra_forbidden":
            beside = [known for known in keys if known.split(".")[0] == key.split(".")[0]]
            lines.append(
                f"unknown key '{key}'; known keys: {', '.join(beside or keys)}{nearest_key(key, keys)}"
            )
        elif finding["type"] == "value_error":
            lines.append(str(finding["ctx"]["error"]))
        elif key.rpartition(".")[2] in SCALARS:  # one finding for each type that a setting may have
            lines.append(
                f"{key.rpartition('.')[0]} = {finding['input']!r} is not allowed: it should be text, a "
                "finite number, true or false"
            )
        else:
            rule = finding["msg"].removeprefix("Input should be ")
            close = nearest(str(finding["input"]), re.findall(r"'([^']*)'", rule))
            lines.append(f"{key} = {finding['input']!r} is not allowed: it should be {rule}{close}")
    return "; ".join(dict.fromkeys(lines))


def section_keys(section: type[Section], prefix: str = "") -> list[str]:
    """Return the keys of a section in the form that users write."""
    return [f"{prefix}{name.replace('_', '-')}" for name in section.model_fields]


def nearest_key(key: str, known: Iterable[str]) -> str:
    """Return "; did you mean …?" with the known key nearest to an unknown one, or an empty text."""
    keys = list(known)
    same = [k for k in keys if k.partition(".")[2] == key]
    return f"; did you mean {same[0]}?" if same else nearest(key, keys)


def parse_override(text: str) -> tuple[str, Any]:
    """Split `key=value`. The value is read as TOML (`3`, `0.1`, `true`), or else as text."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"'{text}' is not of the form key=value")
    try:
        read = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        read = value.strip()
        if re.fullmatch(r"[+-]?(\d+\.|\.\d+)(e[+-]?\d+)?", read):
            read = float(read)
    # No setting is a date; a name may look like one.
    return key.strip(), value.strip() if isinstance(read, date | time) else read
