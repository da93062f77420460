"""Leave one newline at the end of each named file; exit with status 1 if a file had to be changed.

python scripts/end_of_file.py FILE...     # what .pre-commit-config.yaml runs
"""

from __future__ import annotations

import sys
from pathlib import Path


def mend(file: Path) -> bool:
    """Correct the end of a file; return whether it had to be changed."""
    content = file.read_bytes()
    mended = content.rstrip(b"\r\n") + b"\n" if content.strip() else b""
    if mended == content:
        return False
    file.write_bytes(mended)
    print(f"mended {file}")
    return True


if __name__ == "__main__":
    changed = [mend(Path(name)) for name in sys.argv[1:]]
    sys.exit(any(changed))
