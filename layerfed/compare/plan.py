"""What a comparison consists of: rows, budgets, experiments and seeds, and the runs they come to.

A row is a strategy with its settings. An experiment is a configuration that everything else is laid
over. Nothing here reads or runs anything; all that can be refused is refused before the first run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from layerfed.config import ConfigError, Flat, RunConfig, nearest
from layerfed.strategies import STRATEGIES

__all__ = ["Budget", "Cell", "Experiment", "Plan", "Row", "Show", "parse_seeds", "refuse_grid_keys"]

Show = Literal["accuracy", "cost"]

HALF_NORMAL = "half-normal"
# What each run of a comparison gets from its place in it.
GRID_KEYS = {
    "strategy.name": "rows (--strategies)",
    "budget.kind": "budgets (--budgets)",
    "budget.layers": "budgets (--budgets)",
    "run.seed": "seeds (--seeds)",
    "run.name": "the runs' place in the comparison",
    "run.dir": "--dir",
    "run.resume": "what lies in --dir",
}


@dataclass(frozen=True)
class Budget:
    """The budgets of a column: the same for every client, or drawn for each.

    Attributes
    ----------
    name : str
        As in the names of run folders: a number, or `half-normal`.
    settings : Flat
    """

    name: str
    settings: Flat = field(compare=False)

    @classmethod
    def parse(cls, budget: str | float) -> Budget:
        """Read a budget as it is written in a table file or on the command line.

        Raises
        ------
        ConfigError
            If it is neither a number of at least 0 nor `half-normal`.
        """
        if budget == HALF_NORMAL:
            return cls(HALF_NORMAL, {"budget.kind": "half-normal"})
        try:
            number = float(budget)
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf:
            raise ConfigError(f"budget '{budget}' is neither a number nor {HALF_NORMAL}")
        return cls(f"{number:g}", {"budget.kind": "identical", "budget.layers": number})

    @property
    def title(self) -> str:
        """What tables and pictures call it."""
        return self.name if self.name == HALF_NORMAL else f"R = {self.name}"


@dataclass(frozen=True)
class Row:
    """A strategy with its settings, under a name of its own.

    Attributes
    ----------
    name : str
    settings : Flat
        Keys that differ from the experiment's; `strategy.name` among them, unless `name` is one.
    """

    name: str
    settings: Flat = field(default_factory=dict, compare=False)

    @property
    def strategy(self) -> str:
        """The strategy that is run."""
        return str(self.settings.get("strategy.name", self.name))

    @property
    def within_budget(self) -> bool:
        """Whether the strategy keeps to budgets; the others are run once a seed."""
        return STRATEGIES[self.strategy].within_budget

    @property
    def folder(self) -> str:
        """The row's part in the names of run folders."""
        return re.sub(r"[^\w.-]+", "-", self.name).strip("-")


@dataclass(frozen=True)
class Experiment:
    """A configuration that is compared on, and what a paper says of it.

    Attributes
    ----------
    name : str
        As on the command line (`--only`).
    title : str
    base : RunConfig
    folder : str
        Where its runs go, below the comparison's folder; empty: there itself.
    paper : Mapping[str, Sequence[float]]
        Published accuracies in %, by row: one a budget, or one for a row without budgets; NaN where
        there is none.
    paper_costs : Mapping[str, Mapping[str, float]]
        Published costs, by row, and by the columns of `report.tables.PAPER_COSTS`.
    """

    name: str
    title: str
    base: RunConfig
    folder: str = ""
    paper: Mapping[str, Sequence[float]] = field(default_factory=dict, compare=False)
    paper_costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Cell:
    """One run of a comparison; `budget` is None for a row that keeps to none."""

    experiment: str
    row: str
    budget: str | None
    seed: int
    config: RunConfig

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(self.config.run.dir) / self.config.run.name

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.experiment}/{self.config.run.name}"


@dataclass(frozen=True)
class Plan:
    """A whole comparison.

    Attributes
    ----------
    name : str
        Its tables and pictures are called NAME.md, NAME.csv, NAME-accuracy.png, …
    title : str
    rows : Sequence[Row]
    budgets : Sequence[Budget]
    experiments : Sequence[Experiment]
    seeds : Sequence[int]
    show : {"accuracy", "cost"}
        What the table is about.
    reference : str
        The row that others are held against: costs are given in % of it, accuracies as differences to
        it as well. Empty: none.
    source : str
        Where published figures are from.
    note : str
        Printed below the table.

    Raises
    ------
    ConfigError
        If a part is empty, or has two entries of one name, or the reference is no row.
    """

    name: str
    title: str
    rows: Sequence[Row]
    budgets: Sequence[Budget]
    experiments: Sequence[Experiment]
    seeds: Sequence[int]
    show: Show = "accuracy"
    reference: str = ""
    source: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot be told apart or does not exist."""
        _distinct("row", [row.name for row in self.rows])
        _apart(self.rows)
        _distinct("budget", [budget.name for budget in self.budgets])
        _distinct("experiment", [experiment.name for experiment in self.experiments])
        _distinct("seed", [str(seed) for seed in self.seeds])
        for row in self.rows:
            if row.strategy not in STRATEGIES:
                raise ConfigError(
                    f"row '{row.name}': there is no strategy '{row.strategy}'; known: "
                    f"{', '.join(STRATEGIES)}{nearest(row.strategy, STRATEGIES)}"
                )
        if self.reference and self.reference not in [row.name for row in self.rows]:
            raise ConfigError(
                f"reference = '{self.reference}' is no row; rows: "
                f"{', '.join(row.name for row in self.rows)}"
            )

    def cells(self, directory: Path) -> list[Cell]:
        """Return the runs, leaving out what does not exist: `both` where everyone has one layer.

        Parameters
        ----------
        directory : Path
            Where the run folders go.

        Raises
        ------
        ConfigError
            If a run's configuration is impossible, naming the run.
        """
        return [
            cell
            for experiment in self.experiments
            for seed in self.seeds
            for row in self.rows
            for budget in (self.budgets if row.within_budget else [None])
            if (cell := _cell(experiment, row, budget, seed, directory)) is not None
        ]


def _cell(
    experiment: Experiment, row: Row, budget: Budget | None, seed: int, directory: Path
) -> Cell | None:
    middle = "" if budget is None else f"-R{budget.name}"
    name = f"{row.folder}{middle}-seed{seed}".replace("+", "")
    flat = experiment.base.to_flat() | {
        "strategy.name": row.strategy,
        **({} if budget is None else budget.settings),
        **row.settings,
        "run.seed": seed,
        "run.dir": str(directory / experiment.folder),
        "run.name": name,
    }
    if row.strategy == "both" and _room_for_one(flat):
        return None
    try:
        config = RunConfig.from_flat(flat)
    except ConfigError as error:
        raise ConfigError(f"{experiment.name}/{name}: {error}") from None
    return Cell(experiment.name, row.name, budget.name if budget else None, seed, config)


def _room_for_one(flat: Flat) -> bool:
    identical = flat["budget.kind"] == "identical" and flat["budget.unit"] == "layers"
    return identical and float(flat["budget.layers"]) < 2


def _distinct(kind: str, names: Sequence[str]) -> None:
    if not names:
        raise ConfigError(f"there is no {kind} to compare")
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{kind} '{name}' is there twice; give each a name of its own")


def _apart(rows: Sequence[Row]) -> None:
    """Refuse rows whose runs would lie in the same folders."""
    owners: dict[str, str] = {}
    for row in rows:
        if (other := owners.setdefault(row.folder, row.name)) != row.name:
            raise ConfigError(
                f"rows '{other}' and '{row.name}' would share the run folders '{row.folder}-…'; let "
                "their names differ in a letter or a digit"
            )


def parse_seeds(words: Iterable[str]) -> list[int]:
    """Read seeds from the command line.

    Raises
    ------
    ConfigError
        If one is not a whole number from 0.
    """
    found = []
    for word in words:
        if not word.isdecimal():
            raise ConfigError(f"seed '{word}' is not a whole number from 0")
        found.append(int(word))
    return found


def refuse_grid_keys(keys: Iterable[str], where: str, but: str = "") -> None:
    """Refuse settings that would be overwritten by the comparison.

    Raises
    ------
    ConfigError
        If there is one other than `but`, saying what decides it.
    """
    for key in keys:
        if key in GRID_KEYS and key != but:
            raise ConfigError(f"{where}: {key} is decided by {GRID_KEYS[key]}; leave it out")
