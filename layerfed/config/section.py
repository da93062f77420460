"""What all tables of settings share: how strictly they are read, and the error on a wrong one."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["ConfigError", "Section"]


class ConfigError(ValueError):
    """A setting that cannot be run; the message names the key, the value and what is allowed."""


class Section(BaseModel):
    """A table of settings: no unknown keys, no infinities, and no "3" or true for a number."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        strict=True,
        populate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),
    )
