"""What every section of a configuration has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["ConfigError", "Section"]


class ConfigError(ValueError):
    """A setting that cannot be run; the message names the key, the value and what is allowed."""


class Section(BaseModel):
    """Settings under one heading: frozen, of exactly their types, none unknown."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        strict=True,  # no "3" or true for a number
        populate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),
    )
