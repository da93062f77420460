"""The base of all sections of settings: strict reading, and helpers for clear errors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

from layerfed.config.errors import ConfigError, naming_extras

__all__ = [
    "ConfigError",
    "DeviceName",
    "PlugIn",
    "RunName",
    "Section",
    "Switch",
    "imported",
    "nearest",
]


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean …?" with the known word nearest to an unknown one, or an empty text."""
    found = get_close_matches(word, list(known), 1)
    return f"; did you mean {found[0]}?" if found else ""


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
