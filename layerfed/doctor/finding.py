"""A finding of `layerfed doctor`, and checks that always end."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from layerfed.config.errors import EXPECTED

__all__ = ["Check", "Finding", "examine", "size"]


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes
    ----------
    check : str
        What was looked at, in a word or two.
    text : str
        What was found, in one line.
    advice : str
        What to do; empty if there is nothing to do.
    status : {"ok", "note", "wrong"}
        A note is something to know. What is wrong keeps something from working.
    numbers : Mapping[str, Any]
        What was measured, for programs.
    """

    check: str
    text: str
    advice: str = ""
    status: Literal["ok", "note", "wrong"] = "ok"
    numbers: Mapping[str, Any] = field(default_factory=dict)


# A folder of another user is no bug either.
MENDABLE: tuple[type[Exception], ...] = (*EXPECTED, PermissionError)
Check = Callable[[], Iterable[Finding]]


def examine(checks: Mapping[str, Check], seconds: float) -> Iterator[Finding]:
    """Yield the findings of each check.

    A check that fails, or takes longer than `seconds`, is a finding too; a stuck one is left behind in
    its thread, which ends with the process.
    """
    for name, check in checks.items():
        found: list[Finding] = []

        def work(check: Check = check, name: str = name, found: list[Finding] = found) -> None:
            try:
                found.extend(check())
            except MENDABLE as error:  # which say what to do
                found.append(Finding(name, str(error), status="wrong"))
            except Exception as error:  # whatever it is, the other checks go on
                text = f"cannot be checked: {type(error).__name__}: {error}"
                found.append(Finding(name, text, "report this line as a bug", "wrong"))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            text = f"no answer within {seconds:g} s"
            found = [
                Finding(name, text, "try again; if it stays so, it hangs in runs too", "wrong")
            ]
        yield from found


def size(number: float) -> str:
    """Return bytes as a text with a unit."""
    power = min(max(int(math.log10(max(number, 1)) // 3), 0), 4)
    return f"{number / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
