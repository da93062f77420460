"""The benchmarks' command lines refuse an unknown name, and write figures to the given file."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(
    path.name for path in FOLDER.glob("*.py") if '__name__ == "__main__"' in path.read_text("utf-8")
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> object:
    def started(script: str, *arguments: str) -> int | str | None:
        monkeypatch.syspath_prepend(str(FOLDER))
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(FOLDER / script), run_name="__main__")
        return ended.value.code

    return started


@pytest.mark.parametrize(
    "command",
    [
        "deployed.py --contender nonsense",
        "faults.py --fault nonsense",
        "load.py --engine nonsense",
        "selection.py --part nonsense",
        "selection_peers.py nonsense 1",
        "selection_sweep.py --costs nonsense",
        "selection_sweep.py --without nonsense",
        "server_memory.py --who nonsense",
        "simulation.py --contender nonsense",
        "simulation.py --workload nonsense",
        "simulation.py --workload cnn --contender bare-all-cores",
        "startup.py --stage nonsense",
    ],
)
def test_an_unknown_name_is_refused(
    command: str, run: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*command.split()) == 2  # type: ignore[operator]

    assert command.split()[-1] in capsys.readouterr().err or command.endswith("1")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_writes_its_figures_where_it_is_told(
    script: str, run: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(script, "--help") == 0  # type: ignore[operator]

    assert "--json" in capsys.readouterr().out
