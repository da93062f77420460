"""`python -m layerfed.compare.prepare FILE`: try whether configurations can be run on this machine.

FILE holds a list of them. Data and model are loaded, and strategies built, in a process of its own, so
that what they take is given back before the runs begin. Exit status 2 and one line say what is missing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from layerfed.config import ConfigError, RunConfig
from layerfed.engine import prepare

__all__ = ["main"]


def main(file: Path) -> int:
    """Prepare every configuration of a file; return the exit status."""
    for flat in json.loads(file.read_text(encoding="utf-8")):
        try:
            bench = prepare(RunConfig.from_flat(flat))
            bench.task.test_examples()
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
