"""On real devices every message is a process: what it does not need, it does not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each takes from a few tenths of a second to several seconds.
HEAVY = {
    *("sklearn", "scipy", "datasets", "pandas", "pyarrow", "flwr_datasets", "matplotlib"),
    *("timm", "torchvision", "transformers", "open_clip", "ray", "pulp", "highspy"),
}


@pytest.mark.parametrize("message", ["describe", "probe", "train"])
def test_a_message_on_digits_imports_nothing_heavy(message: str, tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        f"import startup; startup.stage({message!r})\n"
        "import json; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    loaded: set[str] = set()
    for _ in range(2):  # the first process of a machine fills the cache
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            env=variables,
            check=True,
        )
        loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "torch" in loaded
    assert loaded & HEAVY == set()
