"""Carry out a comparison: keep completed runs, continue interrupted ones, and start the others.

Every run is a process of its own, forked from one that has the libraries (`children.py`). It frees its
memory at its end, and its failure does not end other runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory

from layerfed.compare.children import Ended, Job, alone_in, run_jobs
from layerfed.compare.output import Output
from layerfed.compare.plan import Cell, Plan
from layerfed.config import ConfigError
from layerfed.config.same import differing
from layerfed.runs import latest_checkpoint
from layerfed.runs.files import read_json
from layerfed.runs.progress import Clock, duration
from layerfed.strategies import option_defaults

__all__ = ["Standing", "compare", "standing"]

LOGS = "logs"


class Standing(Enum):
    """The state of a cell's run folder."""

    DONE = "done"
    STOPPED = "to continue from a checkpoint"
    BROKEN = "to start again"
    ABSENT = "to run"


def standing(cell: Cell) -> Standing:
    """Return the state of a cell's run folder.

    Raises
    ------
    ConfigError
        If the folder holds a run of another configuration.
    """
    theirs = _known(cell.folder / "config.json")
    if theirs is None:
        return Standing.BROKEN if cell.folder.exists() else Standing.ABSENT
    if changed := differing(cell.config, theirs, option_defaults(cell.config.strategy.name)):
        raise ConfigError(
            f"{cell.folder} holds a run of another configuration ({', '.join(changed)} differ); compare "
            "into another --dir, or remove that folder"
        )
    summary = _known(cell.folder / "summary.json")
    if summary is not None and summary.get("status") == "completed":
        return Standing.DONE
    if summary is not None and latest_checkpoint(cell.folder) is not None:
        return Standing.STOPPED
    return Standing.BROKEN


def _known(file: Path) -> Mapping[str, object] | None:
    try:
        return read_json(file)
    except (OSError, ValueError):
        return None


def compare(
    plan: Plan,
    directory: Path,
    *,
    jobs: int = 1,
    engine: str = "auto",
    say: Callable[[str], None] = print,
    show: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> tuple[list[Path], int]:
    """Run what is missing of a comparison, and write its tables and pictures.

    The tables are written again after each run, so they can be read during the comparison.

    Parameters
    ----------
    plan : Plan
    directory : Path
        The folder for run folders, tables and pictures.
    jobs : int
        The number of runs at a time.
    engine : {"auto", "inprocess", "ray"}
        The engine of the runs; `auto` with several jobs is in-process, since the jobs share the machine.
    say : Callable[[str], None]
        Called with a line for each run.
    show : Callable[[int, int, str], None]
        Called with the number of finished runs, that of all runs, and both with the time left as a text.

    Returns
    -------
    tuple[list[Path], int]
        The files written, and the number of runs that failed.

    Raises
    ------
    ConfigError
        If a run is impossible because of its configuration, data, model, or folder. No run has started
        then.
    """
    cells = plan.cells(directory)
    if not cells:
        raise ConfigError(
            f"none of the strategies ({', '.join(row.strategy for row in plan.rows)}) exists with these "
            "budgets and settings: there is nothing to run"
        )
    with alone_in(directory) as lock, TemporaryDirectory(prefix="layerfed-") as scratch:
        found = {cell: standing(cell) for cell in cells}
        output = Output(plan, cells, directory)
        for cell in cells:
            if found[cell] is Standing.DONE:
                output.add(cell)
        missing = [cell for cell in cells if found[cell] is not Standing.DONE]
        say(_overview(found, directory))
        _prepare(missing, plan, directory / LOGS, Path(scratch), lock)
        failed, finished = 0, len(cells) - len(missing)
        clock = Clock(len(cells), finished)
        show(finished, len(cells), f"{finished}/{len(cells)} runs")

        def ended(result: Ended[Cell]) -> None:
            nonlocal failed, finished
            finished += 1
            left = f", about {duration(clock.left(finished) or 0.0)} left"
            text = f"{finished}/{len(cells)} runs{left if finished < len(cells) else ''}"
            show(finished, len(cells), text)
            cell, error = result.job.what, result.error
            if not error and standing(cell) is not Standing.DONE:
                error = f"ended before its run was complete; its log: {result.job.log}"
            if error:
                failed += 1
                say(f"{cell.name}: failed: {error} ({text})")
                return
            run = output.add(cell)
            shown = f"{run.metric.title} {run.metric.text(run.value)}"
            say(f"{cell.name}: {shown}, {run.seconds:.0f} s ({text})")
            output.write_tables()

        if engine == "auto" and jobs > 1:
            engine = "inprocess"
        work = (
            _job(number, cell, found[cell], engine, directory / LOGS, Path(scratch))
            for number, cell in enumerate(missing)
        )
        try:
            run_jobs(work, jobs, ended, lock)
        finally:
            files = [*output.write_tables(), *output.draw()]
    return files, failed


def _overview(found: Mapping[Cell, Standing], directory: Path) -> str:
    counts = [
        f"{count} {kind.value}"
        for kind in Standing
        if (count := sum(value is kind for value in found.values()))
    ]
    return f"{len(found)} runs in {directory}: {', '.join(counts)}"


def _prepare(missing: Sequence[Cell], plan: Plan, logs: Path, scratch: Path, lock: int) -> None:
    """Check that every experiment with missing runs has its data, its model and possible budgets.

    An experiment that fails the check stops the comparison. A column that turns out to be missing after
    days of runs would be worse, and leaving the experiment out takes one word.
    """
    by_experiment: dict[str, list[Cell]] = {}
    for cell in missing:
        by_experiment.setdefault(cell.experiment, []).append(cell)
    jobs = []
    for experiment, cells in by_experiment.items():
        file = scratch / f"{experiment.replace(os.sep, '-')}.json"
        # One seed is enough: other seeds draw other partitions of the same data.
        flats = [cell.config.to_flat() for cell in cells if cell.seed == cells[0].seed]
        file.write_text(json.dumps(flats), encoding="utf-8")
        log = logs / f"prepare-{file.stem}.log"
        jobs.append(Job(experiment, ["layerfed.compare.prepare", str(file)], log))
    errors: dict[str, str] = {}

    def ended(result: Ended[str]) -> None:
        if result.error:
            errors[result.job.what] = result.error

    run_jobs(jobs, 1, ended, lock)
    if errors:
        others = [e.name for e in plan.experiments if e.name not in errors]
        hint = f"; without: --only {','.join(others)}" if others else ""
        found = "; ".join(f"experiment '{name}' cannot run: {e}" for name, e in errors.items())
        raise ConfigError(f"{found}{hint}")


def _job(
    number: int, cell: Cell, state: Standing, engine: str, logs: Path, scratch: Path
) -> Job[Cell]:
    """Return the job that runs a cell, or continues it."""
    flat = cell.config.to_flat()
    if state is Standing.STOPPED:
        flat["run.resume"] = str(cell.folder)
    elif state is Standing.BROKEN:
        _set_aside(cell.folder)
    file = scratch / f"{number}.json"
    file.write_text(json.dumps(flat), encoding="utf-8")
    log = logs / cell.experiment.replace(os.sep, "-") / f"{cell.config.run.name}.log"
    return Job(cell, ["layerfed.cli", "run", str(file), "--engine", engine], log)


def _set_aside(folder: Path) -> None:
    """Rename a folder that cannot be continued; no file of a run is deleted."""
    count = 1
    while (aside := folder.with_name(f"{folder.name}.interrupted-{count}")).exists():
        count += 1
    folder.rename(aside)
