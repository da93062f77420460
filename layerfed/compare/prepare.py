"""`python -m layerfed.compare.prepare FILE`: check that configurations can run on this machine.

FILE holds a list of them. Data and model are loaded, and strategies built, in a process of its own, so
that what they take is given back before the runs begin.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from layerfed.config import RunConfig
from layerfed.config.errors import one_line_errors
from layerfed.engine import prepare

__all__ = ["main"]


def main(file: Path) -> None:
    """Prepare every configuration of a file."""
    for flat in json.loads(file.read_text(encoding="utf-8")):
        bench = prepare(RunConfig.from_flat(flat))
        bench.task.test_examples()


if __name__ == "__main__":
    with one_line_errors():
        main(Path(sys.argv[1]))
