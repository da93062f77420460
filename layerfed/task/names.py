"""The names of classes and groups in a table's columns."""

from __future__ import annotations

import re
from collections.abc import Sequence

from datasets import ClassLabel

from layerfed.config import ConfigError
from layerfed.task.loading import Part

__all__ = ["NameReader", "names_in"]

NUMBER = re.compile(r"-?\d+(\.\d+)?")


def names_in(columns: Sequence[tuple[Part, str]]) -> tuple[str, ...]:
    """Return the names that columns declare or, without a declaration, the values that occur."""
    found: dict[str, None] = {}
    for part, column in columns:
        feature = part.rows.features[column]
        if isinstance(feature, ClassLabel):
            found |= dict.fromkeys(feature.names)
        else:
            values = part.rows.data.column(column).unique().to_pylist()
            # A missing value is refused later, where its row is known.
            names = sorted(str(value) for value in values if not _missing(value))
            # Numbers are sorted as numbers, also those of a table of text.
            if all(NUMBER.fullmatch(name) for name in names):
                names.sort(key=float)
            found |= dict.fromkeys(names)
    return tuple(found)


class NameReader:
    """A reader that turns a column's values into positions among the chosen names, or into None."""

    def __init__(
        self, part: Part, column: str, known: Sequence[str], chosen: Sequence[str]
    ) -> None:
        self._part, self._column, self._known = part, column, known
        position = {name: index for index, name in enumerate(chosen)}
        feature = part.rows.features[column] if column else None
        self._names = feature.names if isinstance(feature, ClassLabel) else None
        self._of: dict[object, int | None] = {
            (index if self._names else name): position.get(name)
            for index, name in enumerate(self._names or known)
        }

    def __call__(self, values: Sequence[object], rows: Sequence[int]) -> list[int | None]:
        """Return the positions of rows' values, None for names not chosen; refuse unknown values."""
        found = []
        for value, row in zip(values, rows, strict=True):
            known = value if self._names or _missing(value) else str(value)
            if known not in self._of:
                raise ConfigError(
                    f"{self._part.where}, row {row}: {self._column} = {value!r} is not allowed: it "
                    f"should be one of {', '.join(self._known[:20])}{' …' * (len(self._known) > 20)}"
                    + (
                        " (given by number, from 0); rows without a label have to be left out"
                        if self._names
                        else ""
                    )
                )
            found.append(self._of[known])
        return found


def _missing(value: object) -> bool:
    """Return whether a cell is empty; a column of numbers has NaN there."""
    return value is None or value != value
