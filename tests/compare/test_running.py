"""A comparison continues where it stopped, has one process at a time, and reports failures."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from layerfed.compare import Budget, Cell, Experiment, Plan, Row, Standing, compare, standing
from layerfed.compare.children import Ended, Job, alone_in, run_jobs
from layerfed.config import ConfigError, RunConfig
from layerfed.runs.checkpoint import Checkpoint, save_checkpoint
from tests.compare.synthetic import write_cell


def plan(seeds: tuple[int, ...] = (0,), **base: Any) -> Plan:
    return Plan(
        name="table",
        title="a table",
        rows=[Row("top"), Row("bottom")],
        budgets=[Budget.parse(1)],
        experiments=[Experiment("digits", "Digits", RunConfig.from_flat(base))],
        seeds=seeds,
    )


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    return plan().cells(tmp_path)[0]


# ------------------------------------------------------------------------------- how far a cell is
def test_a_cell_is_absent_done_to_go_on_or_broken(cell: Cell) -> None:
    assert standing(cell) is Standing.ABSENT
    write_cell(cell)
    assert standing(cell) is Standing.DONE
    summary = cell.folder / "summary.json"
    for status in ("running", "interrupted", "failed"):
        summary.write_text(json.dumps({"status": status}))
        assert standing(cell) is Standing.BROKEN
    place = save_checkpoint(cell.folder, Checkpoint(1, "base", "token", {}, {}), keep=1)
    assert standing(cell) is Standing.STOPPED
    (place / "state.json").write_text("{")
    assert standing(cell) is Standing.BROKEN


@pytest.mark.parametrize("file", ["config.json", "summary.json"])
@pytest.mark.parametrize("left", [None, "{", "[]"])
def test_what_was_killed_while_it_was_written_is_broken(
    file: str, left: str | None, cell: Cell
) -> None:
    write_cell(cell)
    (cell.folder / file).unlink()
    if left is not None:
        (cell.folder / file).write_text(left)
    assert standing(cell) is Standing.BROKEN


def test_another_configuration_is_refused_and_another_place_is_not(cell: Cell) -> None:
    write_cell(cell)
    file = cell.folder / "config.json"
    flat = json.loads(file.read_text())
    file.write_text(json.dumps(flat | {"run.dir": "/elsewhere", "run.device": "cuda"}))
    assert standing(cell) is Standing.DONE
    for key, value in (("train.lr", 9.0), ("run.seed", 5)):
        file.write_text(json.dumps(flat | {key: value}))
        with pytest.raises(ConfigError, match=rf"another configuration \({key} differ\)"):
            standing(cell)


def test_a_comparison_without_runs_is_refused(tmp_path: Path) -> None:
    nothing = dataclasses.replace(plan(), rows=[Row("both")])
    with pytest.raises(ConfigError, match=r"strategies \(both\) exists .* nothing to run"):
        compare(nothing, tmp_path)


# ------------------------------------------------------------------------------ a whole comparison
class Launcher:
    """A replacement for processes: it writes run folders, or fails, and keeps its calls."""

    def __init__(self, errors: dict[str, str] | None = None) -> None:
        self.errors = errors or {}
        self.prepared: list[list[dict[str, Any]]] = []
        self.ran: list[dict[str, Any]] = []

    def __call__(
        self, jobs: Iterable[Job[Any]], abreast: int, ended: Callable[[Ended[Any]], None], lock: int
    ) -> None:
        for job in jobs:
            config = json.loads(
                Path(job.arguments[-3 if "run" in job.arguments else -1]).read_text()
            )
            if job.arguments[0] == "layerfed.compare.prepare":
                self.prepared.append(config)
            else:
                assert job.arguments[:2] == ["layerfed.cli", "run"]
                self.ran.append(config)
            name = job.what if isinstance(job.what, str) else job.what.config.run.name
            if name not in self.errors and isinstance(job.what, Cell):
                if not config["run.resume"]:
                    write_cell(job.what)
                file = job.what.folder / "summary.json"
                summary = json.loads(file.read_text())
                file.write_text(json.dumps(summary | {"status": "completed"}))
            ended(Ended(job, self.errors.get(name, "")))


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    fake = Launcher()
    monkeypatch.setattr("layerfed.compare.running.run_jobs", fake)
    return fake


def test_only_what_is_missing_is_run(launcher: Launcher, tmp_path: Path) -> None:
    first, second = plan().cells(tmp_path)
    write_cell(first)
    files, failed = compare(plan(), tmp_path)
    assert failed == 0
    assert [config["run.name"] for config in launcher.ran] == [second.config.run.name]
    assert [file.name for file in files] == [
        "table.md",
        "table.csv",
        "table.tex",
        "table-accuracy.png",
        "table-uplink.png",
        "table-theory.png",
        "table.html",
    ]
    text = files[0].read_text()
    compare(plan(), tmp_path)
    assert len(launcher.ran) == len(launcher.prepared) == 1, "nothing is left to run or to try"
    assert files[0].read_text() == text


def test_interrupted_runs_go_on_and_broken_ones_are_set_aside(
    launcher: Launcher, tmp_path: Path
) -> None:
    first, second = plan().cells(tmp_path)
    for cell in (first, second):
        write_cell(cell, status="running")
    save_checkpoint(first.folder, Checkpoint(1, "base", "token", {}, {}), keep=1)
    lines: list[str] = []
    compare(plan(), tmp_path, say=lines.append)
    assert [config["run.resume"] for config in launcher.ran] == [str(first.folder), ""]
    assert "1 to continue from a checkpoint, 1 to start again" in lines[0]
    aside = second.folder.with_name(second.folder.name + ".interrupted-1")
    assert json.loads((aside / "summary.json").read_text())["status"] == "running"
    assert standing(second) is Standing.DONE


def test_a_failed_run_is_one_line_and_the_others_go_on(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run takes ten seconds here."""
    clock = SimpleNamespace(monotonic=itertools.count(0, 10).__next__)
    monkeypatch.setattr("layerfed.runs.progress.time", clock)
    shown: list[tuple[int, int]] = []
    launcher.errors = {"top-R1-seed0": "round 3: no replies"}
    lines: list[str] = []
    files, failed = compare(
        plan(seeds=(0, 1)),
        tmp_path,
        say=lines.append,
        show=lambda done, total, text: shown.append((done, total)),
    )
    assert failed == 1
    assert "digits/top-R1-seed0: failed: round 3: no replies (1/4 runs, about 0:30 left)" in lines
    assert "(3/4 runs, about 0:10 left)" in lines[3]
    assert lines[4].endswith(" s (4/4 runs)")
    assert shown == [*((n, 4) for n in range(5))]
    assert len(lines) == 1 + 4
    assert "| top | **50.00 (1 of 2)** |" in files[0].read_text()
    launcher.errors = {}
    assert compare(plan(seeds=(0, 1)), tmp_path)[1] == 0
    assert len(launcher.ran) == 4 + 1


def test_an_experiment_that_cannot_run_stops_the_others_before_they_begin(
    launcher: Launcher, tmp_path: Path
) -> None:
    launcher.errors = {"b": "task.data = 'gone' does not exist"}
    parts = vars(plan()) | {"experiments": [Experiment(n, n, RunConfig(), n) for n in "abc"]}
    with pytest.raises(ConfigError) as refused:
        compare(Plan(**parts), tmp_path)
    assert str(refused.value) == (
        "experiment 'b' cannot run: task.data = 'gone' does not exist; without: --only a,c"
    )
    assert len(launcher.prepared) == 3, (
        "all are tried, so that all that is missing is known at once"
    )
    assert not launcher.ran


def test_one_seed_of_each_row_is_tried(launcher: Launcher, tmp_path: Path) -> None:
    compare(plan(seeds=(4, 5)), tmp_path)
    assert [config["run.name"] for config in launcher.prepared[0]] == [
        "top-R1-seed4",
        "bottom-R1-seed4",
    ]


def test_a_damaged_run_is_named(launcher: Launcher, cell: Cell, tmp_path: Path) -> None:
    write_cell(cell)
    (cell.folder / "layers.json").unlink()
    with pytest.raises(
        ConfigError, match=r"top-R1-seed0 is marked as completed, but cannot be read"
    ):
        compare(plan(), tmp_path)


# -------------------------------------------------------------------------------------- processes
@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Make modules that `python -m` finds."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)

    return make


def test_so_many_run_at_a_time_and_errors_are_their_last_words(
    module: Callable[[str, str], None], tmp_path: Path
) -> None:
    module(
        "well",
        "import os, sys\n"
        "for name in os.listdir('/proc/self/fd'):\n"
        "    if os.path.exists(place := f'/proc/self/fd/{name}'): print(os.stat(place).st_ino)\n"
        "print(*sys.argv, __name__, os.getsid(0) == os.getpid())",
    )
    module("said", "print('error: no such data'); print('more'); raise SystemExit(2)")
    module("raised", "raise ValueError('oh')")
    module("died", "import os; os.kill(os.getpid(), 9)")
    found: dict[str, str] = {}
    with alone_in(tmp_path) as lock:
        names = ("well", "said", "raised", "died")
        jobs = [Job(name, [name, "an argument"], tmp_path / f"logs/{name}.log") for name in names]
        run_jobs(jobs, 2, lambda end: found.update({end.job.what: end.error}), lock)
    assert found["well"] == ""
    assert found["said"] == "no such data"
    assert found["raised"] == f"ValueError: oh; its log: {tmp_path}/logs/raised.log"
    assert found["died"] == f"killed by SIGKILL; its log: {tmp_path}/logs/died.log"
    *inherited, said = (tmp_path / "logs/well.log").read_text().splitlines()
    assert str((tmp_path / ".lock").stat().st_ino) in inherited
    assert said.split("/")[-1] == "well.py an argument __main__ True"


def test_jobs_are_forks_that_share_nothing(
    module: Callable[[str, str], None], tmp_path: Path
) -> None:
    """The libraries are there at the start; what a job changes in them, another does not see."""
    module(
        "job",
        "import sys, layerfed.runs, atexit, multiprocessing\n"
        "assert 'layerfed.engine' in sys.modules, 'imported before the fork'\n"
        "atexit.register(print, 'its end')\n"
        "print(getattr(layerfed.runs, 'mark', 'clean'), multiprocessing.get_start_method())\n"
        "layerfed.runs.mark = 'changed'\n",
    )
    with alone_in(tmp_path) as lock:
        jobs = [Job(n, ["job"], tmp_path / f"{n}.log") for n in range(3)]
        ends: list[Ended[int]] = []
        run_jobs(jobs, 1, ends.append, lock)
    assert [end.error for end in ends] == ["", "", ""]
    method = multiprocessing.get_start_method()
    for n in range(3):
        assert (tmp_path / f"{n}.log").read_text() == f"clean {method}\nits end\n"


@pytest.mark.parametrize("deaf", [False, True])
def test_whatever_ends_a_comparison_ends_its_runs(
    deaf: bool,
    module: Callable[[str, str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("layerfed.compare.children.GRACE_SECONDS", 20.0 if not deaf else 0.3)
    module(
        "endless",
        "import os, pathlib, signal, time\n"
        f"signal.signal(signal.SIGTERM, signal.SIG_IGN if {deaf} else signal.default_int_handler)\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "(here / 'pid.tmp').write_text(str(os.getpid()))\n"
        "(here / 'pid.tmp').rename(here / 'pid')\n"
        "try:\n"
        "    time.sleep(600)\n"
        "except KeyboardInterrupt:\n"
        "    (here / 'orderly').touch()\n",
    )
    module(
        "brief",
        "import pathlib, time\n"
        f"while not pathlib.Path({str(tmp_path / 'pid')!r}).exists(): time.sleep(0.05)\n",
    )

    def interrupted(_: Ended[str]) -> None:
        raise KeyboardInterrupt

    jobs = [Job(name, [name], tmp_path / f"{name}.log") for name in ("endless", "brief")]
    with alone_in(tmp_path) as lock, pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, 2, interrupted, lock)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert (tmp_path / "orderly").exists() != deaf


def test_a_folder_is_one_comparisons_and_its_runs(tmp_path: Path) -> None:
    with alone_in(tmp_path) as lock:
        with pytest.raises(ConfigError, match="another comparison, or a run that one left behind"):
            alone_in(tmp_path).__enter__()
        inherited = os.dup(lock)  # as a run does that outlives its comparison
    try:
        with pytest.raises(ConfigError, match="is at work in"), alone_in(tmp_path):
            pass
    finally:
        os.close(inherited)
    with alone_in(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"), alone_in(tmp_path / "file" / "x"):
        pass
