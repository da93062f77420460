"""A process that answers one message imports only what it needs, as on real devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each takes from a few tenths of a second to several seconds.
HEAVY = {
    *("sklearn", "scipy", "datasets", "pandas", "pyarrow", "flwr_datasets", "matplotlib"),
    *("timm", "torchvision", "transformers", "open_clip", "ray", "pulp", "highspy"),
    *("torch._dynamo", "sympy"),
}


def imported(message: str, cache: Path) -> set[str]:
    """Return which of these libraries a process has imported after one message."""
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        f"import startup; startup.stage({message!r})\n"
        f"print(*sorted({HEAVY!r} & set(sys.modules)))"
    )
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=variables, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine's cache after its first process."""
    folder = tmp_path_factory.mktemp("cache")
    assert "datasets" in imported("describe", folder)
    return folder


@pytest.mark.parametrize("message", ["probe", "train"])
def test_a_message_on_digits_imports_nothing_heavy(message: str, cache: Path) -> None:
    assert imported(message, cache) == set()
