"""The page of a run or a comparison: one HTML file with all it needs, which works without a network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import zlib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from layerfed.files import whole

__all__ = ["PAGE", "page", "plain", "write_page"]

# Its name in a run folder.
PAGE = "report.html"

# Significant digits of a number that is no whole number: more than the page shows.
DIGITS = 7


def write_page(view: Mapping[str, Any], file: Path) -> Path:
    """Write a page in place of what is there; return its path.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    with whole(file) as beside:
        beside.write_text(page(view), encoding="utf-8")
    return file


def page(view: Mapping[str, Any], *, live: bool = False) -> str:
    """Return the HTML of a page.

    Names and reasons come from clients, so none of them becomes markup: the data are compressed and in
    base64, the script writes text nodes only, and the page's policy runs no other script.

    Parameters
    ----------
    view : Mapping[str, Any]
        That of `run_view` or `comparison_view`, or the list of runs of `layerfed watch`.
    live : bool (default: False)
        Whether the page asks the server that it came from for news. Otherwise it asks for nothing.
    """
    script = _asset("page.js")
    packed = zlib.compress(json.dumps(plain(view), separators=(",", ":")).encode())
    parts = {
        "TITLE": html.escape(f"{view['title']} · LayerFed"),
        "SENTENCE": html.escape(str(view.get("sentence", ""))),
        "CONNECT": "'self'" if live else "'none'",
        "HASH": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "LIVE": "live" if live else "still",
        "STYLE": _asset("page.css"),
        "SCRIPT": script,
        "DATA": base64.b64encode(packed).decode(),
    }
    # Cut at the marks once, so that a mark in a name stays text.
    pieces = _asset("page.html").split("%%")
    return "".join(parts[piece] if n % 2 else piece for n, piece in enumerate(pieces))


@cache
def _asset(name: str) -> str:
    """Return a file of the installed package; Flower's app bundle has no such files."""
    return (resources.files("layerfed_assets") / "page" / name).read_text(encoding="utf-8")


def plain(value: Any) -> Any:
    """Return data that JSON can hold: numbers in short form, and None for NaN and infinities."""
    if type(value) is float:  # first, since most are
        if not math.isfinite(value):
            return None
        short = float(f"{value:.{DIGITS}g}")
        return int(value) if value.is_integer() and abs(value) < 2**53 else short
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    return value
