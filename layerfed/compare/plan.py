"""The plan of a comparison: its rows, budgets, experiments and seeds, and the runs that follow.

A row is a strategy with its settings. An experiment is a configuration on which rows, budgets and seeds
are laid. A plan reads and runs nothing, so that impossible runs are refused before the first one starts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from layerfed.config import ConfigError, Flat, RunConfig, section_keys
from layerfed.strategies import checked, load_strategy, option_keys

__all__ = ["Budget", "Cell", "Experiment", "Plan", "Row", "Show", "parse_seeds", "refuse_grid_keys"]

Show = Literal["accuracy", "cost"]

HALF_NORMAL = "half-normal"
# The settings that a run gets from its place in the comparison, each with what decides it.
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
        The name in run folders: a number, or `half-normal`.
    settings : Flat
    """

    name: str
    settings: Flat = field(compare=False)

    @classmethod
    def parse(cls, budget: str | float) -> Budget:
        """Return the budget for its text in a table file or on the command line.

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
        name = f"{number:g}" if float(f"{number:g}") == number else repr(number)
        return cls(name, {"budget.kind": "identical", "budget.layers": number})

    @property
    def title(self) -> str:
        """The budget's name in tables and pictures."""
        return self.name if self.name == HALF_NORMAL else f"R = {self.name}"


@dataclass(frozen=True)
class Row:
    """A strategy with its settings and a name.

    Attributes
    ----------
    name : str
    settings : Flat
        Settings that differ from the experiment's. They include `strategy.name`, unless `name` is a
        strategy.
    """

    name: str
    settings: Flat = field(default_factory=dict, compare=False)

    @property
    def strategy(self) -> str:
        """The name of the row's strategy."""
        return str(self.settings.get("strategy.name", self.name))

    @property
    def within_budget(self) -> bool:
        """Whether the strategy respects budgets; the others run once for each seed."""
        return load_strategy(self.strategy).within_budget

    @property
    def folder(self) -> str:
        """The row's part in the names of run folders."""
        return re.sub(r"[^\w.-]+", "-", self.name).strip("-")


@dataclass(frozen=True)
class Experiment:
    """A configuration to compare rows on, and published figures for it.

    Attributes
    ----------
    name : str
        The name on the command line (`--only`).
    title : str
    base : RunConfig
    folder : str
        The folder for its runs, below the comparison's folder; empty for that folder itself.
    paper : Mapping[str, Sequence[float]]
        Published accuracies in %, by row: one for each budget, or one for a row without budgets. NaN
        stands for a missing one.
    paper_costs : Mapping[str, Mapping[str, float]]
        Published costs, by row, and by the columns of `report.PAPER_COSTS`.
    """

    name: str
    title: str
    base: RunConfig
    folder: str = ""
    paper: Mapping[str, Sequence[float]] = field(default_factory=dict, compare=False)
    paper_costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Cell:
    """One run of a comparison; `budget` is None for a row without budgets."""

    experiment: str
    row: str
    budget: str | None
    seed: int
    config: RunConfig

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.dir) / self.config.run.name

    @property
    def name(self) -> str:
        """The run's name in messages."""
        return f"{self.experiment}/{self.config.run.name}"


@dataclass(frozen=True)
class Plan:
    """A whole comparison.

    Attributes
    ----------
    name : str
        The NAME in NAME.md, NAME.csv, NAME-accuracy.png, …
    title : str
    rows : Sequence[Row]
    budgets : Sequence[Budget]
    experiments : Sequence[Experiment]
    seeds : Sequence[int]
    show : {"accuracy", "cost"}
        The kind of table.
    reference : str
        The row to which others are compared: costs are in % of its costs, and accuracies are also given
        as differences to its accuracies. Empty for none.
    source : str
        The source of published figures.
    note : str
        A text to print below the table.

    Raises
    ------
    ConfigError
        If a part is empty or has two entries of one name, or if the reference is no row.
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
        """Refuse empty parts, duplicate names, unknown strategies, and a reference that is no row."""
        _distinct("row", [row.name for row in self.rows])
        _distinct("budget", [budget.name for budget in self.budgets])
        _distinct("experiment", [experiment.name for experiment in self.experiments])
        _distinct("seed", [str(seed) for seed in self.seeds])
        for row in self.rows:
            try:
                load_strategy(row.strategy)
            except ConfigError as error:
                raise ConfigError(f"row '{row.name}': {error}") from None
        if self.reference and self.reference not in [row.name for row in self.rows]:
            raise ConfigError(
                f"reference = '{self.reference}' is no row; rows: "
                f"{', '.join(row.name for row in self.rows)}"
            )

    def cells(self, directory: Path) -> list[Cell]:
        """Return the runs, without those that do not exist, such as `both` with one layer a client.

        Parameters
        ----------
        directory : Path
            The folder for the run folders.

        Raises
        ------
        ConfigError
            If a run's configuration is impossible, or two rows would share a folder.
        """
        found = [
            cell
            for experiment in self.experiments
            for seed in self.seeds
            for row in self.rows
            for budget in (self.budgets if row.within_budget else [None])
            if (cell := self._cell(experiment, row, budget, seed, directory)) is not None
        ]
        _apart(found)
        return found

    def _cell(
        self, experiment: Experiment, row: Row, budget: Budget | None, seed: int, directory: Path
    ) -> Cell | None:
        middle = "" if budget is None else f"-R{budget.name}"
        name = f"{row.folder}{middle}-seed{seed}".replace("+", "")
        settings = {
            "strategy.name": row.strategy,
            **({} if budget is None else budget.settings),
            **row.settings,
            "run.seed": seed,
            "run.dir": str(directory / experiment.folder),
            "run.name": name,
        }
        try:
            strategy = load_strategy(row.strategy)
            # An option of a user's own strategy has no meaning to other rows.
            read = {*section_keys(strategy.Options, "strategy."), *option_keys()}
            unread = self._own_options() - read
            base = {k: v for k, v in experiment.base.to_flat().items() if k not in unread}
            config = RunConfig.from_flat(base | settings).simulated()
            if not strategy.exists(config):
                return None
            config = checked(config)
        except ConfigError as error:
            raise ConfigError(f"{experiment.name}/{name}: {error}") from None
        return Cell(experiment.name, row.name, budget.name if budget else None, seed, config)

    def _own_options(self) -> set[str]:
        strategies = [load_strategy(row.strategy) for row in self.rows if ":" in row.strategy]
        return {key for own in strategies for key in section_keys(own.Options, "strategy.")}


def _distinct(kind: str, names: Sequence[str]) -> None:
    if not names:
        raise ConfigError(f"there is no {kind} to compare")
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{kind} '{name}' occurs twice; give each a name of its own")


def _apart(cells: Iterable[Cell]) -> None:
    """Refuse rows whose runs would have the same folders."""
    owners: dict[Path, str] = {}
    for cell in cells:
        if (other := owners.setdefault(cell.folder, cell.row)) != cell.row:
            raise ConfigError(
                f"rows '{other}' and '{cell.row}' would share the run folder '{cell.folder}'; let "
                "their names differ in a letter or a digit"
            )


def parse_seeds(words: Iterable[str]) -> list[int]:
    """Read seeds from the command line.

    Raises
    ------
    ConfigError
        If a word is not a whole number of at least 0.
    """
    found = []
    for word in words:
        if not word.isdecimal():
            raise ConfigError(f"seed '{word}' is not a whole number from 0")
        found.append(int(word))
    return found


def refuse_grid_keys(keys: Iterable[str], where: str, but: str = "") -> None:
    """Refuse settings that the comparison would overwrite.

    Raises
    ------
    ConfigError
        If there is one other than `but`. The message says what decides it.
    """
    for key in keys:
        if key in GRID_KEYS and key != but:
            raise ConfigError(f"{where}: {key} is decided by {GRID_KEYS[key]}; leave it out")
