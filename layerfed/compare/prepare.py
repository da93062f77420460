"""`python -m layerfed.compare.prepare FILE`: check that configurations can run on this machine.

FILE holds a list of configurations. The check loads data and model and builds the strategies in a
process of its own, which frees their memory before the runs begin. If something is missing, one line
says what, and the exit status is 2.
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
