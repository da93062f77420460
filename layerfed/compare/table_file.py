"""Table files, which describe a whole comparison in TOML, such as `conf/tables/table1.toml`.

title = "Identical budgets"
show = "accuracy"                       # or "cost"
seeds = [0, 1, 2]
budgets = [1, 2]                        # or "half-normal"
source = "[S, Table 1]"                 # of the published figures
set = { run.evaluate-every = 5 }        # settings on top of every experiment's, if any

[rows]                                  # a strategy's name, or a name with settings
full = {}
"every second round" = { strategy.name = "ilp", strategy.period = 2 }

[experiments.cifar10]
title = "CIFAR-10"
conf = "../cifar10.toml"                # relative to this file's folder
set = { federation.rounds = 50 }        # settings on top of these, if any

[experiments.cifar10.paper]             # published, in %: one, or one a budget; nan: none
full = 95.43
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from layerfed.compare.plan import Budget, Experiment, Plan, Row, Show, refuse_grid_keys
from layerfed.config import (
    ConfigError,
    RunConfig,
    explain,
    flatten,
    load_config,
    nearest,
    overridden,
    shipped,
)
from layerfed.report import PAPER_COSTS

__all__ = ["is_table_file", "load_plan"]

Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Experiment(_Strict):
    title: str = ""
    conf: Annotated[str, Field(min_length=1)]
    set: dict[str, Any] = {}
    paper: dict[str, float | list[float] | dict[str, float]] = {}


class _Table(_Strict):
    title: Annotated[str, Field(min_length=1)]
    show: Show = "accuracy"
    seeds: list[Annotated[int, Field(ge=0)]] = [0, 1, 2]
    budgets: list[float | int | Literal["half-normal"]]
    reference: str = ""
    source: str = ""
    note: str = ""
    set: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]]
    experiments: dict[Name, _Experiment]


def is_table_file(file: Path) -> bool:
    """Return whether a file is a table file and not a run's configuration."""
    try:
        table = tomllib.loads(shipped(file).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False  # reading it as a configuration gives the error
    return bool({"rows", "experiments"} & table.keys())


def load_plan(
    file: Path,
    overrides: Sequence[str] = (),
    *,
    seeds: Sequence[int] = (),
    only: Sequence[str] = (),
) -> Plan:
    """Return the plan that a table file describes.

    Parameters
    ----------
    file : Path
    overrides : Sequence[str]
        `key=value` settings on top of every experiment's configuration, of which no row may have another
        value.
    seeds : Sequence[int]
        Seeds to use instead of the file's.
    only : Sequence[str]
        Names of the experiments to keep; empty: all.

    Raises
    ------
    ConfigError
        If the file, or a configuration that it names, cannot be run.
    """
    file = shipped(file)
    try:
        table = _Table.model_validate(tomllib.loads(file.read_text(encoding="utf-8-sig")))
    except ValidationError as error:
        known = [*_Table.model_fields, *(f"experiments.*.{k}" for k in _Experiment.model_fields)]
        raise ConfigError(f"{file}: {explain(error, known)}") from None
    if unknown := [name for name in only if name not in table.experiments]:
        raise ConfigError(
            f"--only {unknown[0]}: {file} has no such experiment; it has "
            f"{', '.join(table.experiments)}{nearest(unknown[0], table.experiments)}"
        )
    rows = [_row(name, settings, file) for name, settings in table.rows.items()]
    for key, value in overridden(overrides).items():
        if own := [row.name for row in rows if row.settings.get(key, value) != value]:
            raise ConfigError(
                f"{key} = {value!r}: rows of {file} have their own ({', '.join(own)}); leave it out, or "
                "change it there"
            )
    budgets = [Budget.parse(budget) for budget in table.budgets]
    plan = Plan(
        name=file.stem,
        title=table.title,
        rows=rows,
        budgets=budgets,
        experiments=[
            _experiment(name, section, table.set, file, overrides)
            for name, section in table.experiments.items()
            if not only or name in only
        ],
        seeds=seeds or table.seeds,
        show=table.show,
        reference=table.reference,
        source=table.source,
        note=table.note,
    )
    for name, section in table.experiments.items():
        _check_paper(name, section.paper, plan, file)
    return plan


def _row(name: str, settings: Mapping[str, Any], file: Path) -> Row:
    row = Row(name, flatten(settings))
    if not row.folder:
        raise ConfigError(f"{file}: row '{name}' needs a letter or a digit in its name")
    refuse_grid_keys(row.settings, f"{file}: row '{name}'", but="strategy.name")
    if scored := [key for key in ("task.metric", "task.name") if key in row.settings]:
        raise ConfigError(
            f"{file}: row '{name}' has {scored[0]}, and differences to rows with another score mean "
            "nothing; give it in [set] or in an experiment"
        )
    return row


def _experiment(
    name: str,
    section: _Experiment,
    common: Mapping[str, Any],
    file: Path,
    overrides: Sequence[str],
) -> Experiment:
    settings = flatten(common) | flatten(section.set)
    refuse_grid_keys(settings, f"{file}: experiment '{name}'")
    try:
        base = RunConfig.from_flat(
            load_config(file.parent / section.conf).to_flat() | settings | overridden(overrides)
        )
    except ConfigError as error:
        raise ConfigError(f"experiment '{name}': {error}") from None
    return Experiment(
        name,
        section.title or name,
        base,
        folder=name,
        paper={
            row: found if isinstance(found, list) else [found]
            for row, found in section.paper.items()
            if not isinstance(found, dict)
        },
        paper_costs={row: f for row, f in section.paper.items() if isinstance(f, dict)},
    )


def _check_paper(
    name: str, paper: Mapping[str, float | list[float] | dict[str, float]], plan: Plan, file: Path
) -> None:
    """Refuse published figures without a place in the table."""
    rows = {row.name: row for row in plan.rows}
    where = f"{file}: experiments.{name}.paper"
    for row, figures in paper.items():
        if row not in rows:
            raise ConfigError(f"{where}: '{row}' is no row; rows: {', '.join(rows)}")
        if plan.show == "cost":
            if not isinstance(figures, dict) or figures.keys() - PAPER_COSTS:
                raise ConfigError(
                    f"{where}.{row} = {figures} is not allowed: it should be a table of "
                    f"{', '.join(PAPER_COSTS)}"
                )
            continue
        wanted = len(plan.budgets) if rows[row].within_budget else 1
        found = [figures] if isinstance(figures, float) else figures
        if isinstance(found, dict) or len(found) != wanted:
            raise ConfigError(
                f"{where}.{row} = {figures} is not allowed: it should be {wanted} accuracies in %, "
                "in the order of the budgets"
            )
        if any(not (math.isnan(figure) or 0 <= figure <= 100) for figure in found):
            raise ConfigError(f"{where}.{row} = {figures}: accuracies are between 0 and 100%")
