"""The benchmarks' command lines refuse an unknown name, and write figures to the given file."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from benchmarks import promise

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


def test_the_figure_of_masks_has_a_bar_for_each_who_chooses_and_rate(tmp_path: Path) -> None:
    rates = 0.01, 0.1
    rows = [
        {"rate": rate, "local": 0.1, "together": 0.2 * layer, "grad_norm_sq": 1.0 + layer}
        for rate in rates
        for layer in range(3)
    ]
    names = {name for _, name, _ in promise.MASKS if name}
    made = [
        {"rate": rate, "statistic": name, "shared": 0.1, "together": 0.2, "damped": 0.3}
        for rate in rates
        for name in sorted(names)
    ]
    promise.draw(rows, made, tmp_path / "masks.png")
    axes = promise.plt.gcf().axes
    heights = [[bar.get_height() for bar in bars] for bars in axes[3].containers]
    assert heights == [[0.4, 0.4], [0.1, 0.1], [0.2, 0.2], [0.3, 0.3], [0.3, 0.3]]
    promise.plt.close()
    assert (tmp_path / "masks.png").stat().st_size > 10_000


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_writes_its_figures_where_it_is_told(
    script: str, run: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(script, "--help") == 0  # type: ignore[operator]

    assert "--json" in capsys.readouterr().out
