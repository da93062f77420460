"""The base of all tasks on data sets: classes, groups, partitions, and rows that are encoded once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets
from torch import Tensor

from layerfed.config import ConfigError, nearest
from layerfed.config.section import words
from layerfed.digests import content_digest
from layerfed.models.block_finder import some
from layerfed.runs.files import read_json
from layerfed.task.base import Batch, Examples, Inputs, Task
from layerfed.task.loading import (
    Part,
    kept,
    load_splits,
    pick_columns,
    pick_splits,
    require_type,
)
from layerfed.task.names import NameReader, names_in
from layerfed.task.partition import partition_indices
from layerfed.task.prepared import prepared

__all__ = ["DatasetTask", "Encoder", "Table", "join_parts"]

# Part of the key of every kept file. Raise it when the encoding of a row changes.
FORMAT = 3
# A label column with more values than this, and than a fourth of the rows, hardly holds class names.
MANY = 50
# The group given to test rows whose own group has no training row.
UNSEEN = -1

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Encoder:
    """The way from a row's inputs to tensors.

    Attributes
    ----------
    key : object
        Everything that the result depends on.
    features : Mapping[str, object]
        The result of `encode` for a row, as features of `datasets`.
    encode : Callable[[Columns, Sequence[int], str], Columns]
        Encodes some rows. It gets their input columns, their numbers, and their source for messages.
    collate : Callable[[pyarrow.Table], dict[str, Tensor]]
        Makes a batch of encoded rows.
    """

    key: object
    features: dict[str, object]
    encode: Callable[[Columns, Sequence[int], str], Columns]
    collate: Callable[[pa.Table], dict[str, Tensor]]


class Table:
    """A store of encoded rows in memory-mapped files."""

    def __init__(self, rows: Dataset, collate: Callable[[pa.Table], dict[str, Tensor]]) -> None:
        self.rows = rows
        self._arrow = rows.with_format("arrow")
        self.collate = collate

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def column(self, name: str) -> np.ndarray:
        """Return a column of numbers, shape (N,)."""
        found: np.ndarray = self._arrow.data.column(name).to_numpy()
        return found

    def batch(self, indices: np.ndarray) -> Batch:
        """Return some rows as a batch; labels come as int64 under `label`, unless it has its own."""
        rows = self._arrow[indices]
        made = self.collate(rows)
        if "label" in made:
            return made
        return {**made, "label": torch.from_numpy(rows.column("label").to_numpy().copy())}


def join_parts(parts: Sequence[Dataset]) -> Dataset:
    """Return encoded parts as one table; nothing is copied."""
    return concatenate_datasets(list(parts)) if len(parts) > 1 else parts[0]


class DatasetTask(Task):
    """A task whose examples are rows with inputs, a label, and possibly a group.

    A subclass says where its data are (`hub`, or `parts`), which columns it reads, and how inputs are
    encoded. One without labels has the label column "" and no classes. Encoding leaves out rows of
    classes or groups that were not chosen. If no groups are chosen, test rows of every group count,
    since groups only decide which client trains on which rows.
    """

    settings: ClassVar[frozenset[str]] = frozenset(
        {
            "data",
            "input_columns",
            "label_column",
            "group_column",
            "classes",
            "groups",
            "holdout_group",
            "train_split",
            "test_split",
            "test_share",
        }
    )
    hub: ClassVar[str] = ""
    """The hub id of the data, unless `task.data` says otherwise."""
    inputs: ClassVar[tuple[tuple[str, ...], ...]]
    """Candidates for the input columns; the first candidate whose columns all exist is used."""
    labels: ClassVar[tuple[tuple[str, ...], ...]] = (("label",),)
    group_columns: ClassVar[tuple[tuple[str, ...], ...]] = ()
    default_classes: ClassVar[tuple[str, ...]] = ()
    """The classes to keep unless `task.classes` says otherwise; empty keeps all."""
    default_groups: ClassVar[tuple[str, ...]] = ()

    # ----------------------------------------------------------------------------- the data
    @property
    @abstractmethod
    def encoder(self) -> Encoder:
        """The way from a row's inputs to tensors."""

    @property
    def data(self) -> str:
        """Hub id, folder or file.

        Raises
        ------
        ConfigError
            If `task.data` is empty and the task has no data of its own.
        """
        if not (self.config.task.data or self.hub):
            raise ConfigError(
                f"task.name = '{self.config.task.name}' needs data: set task.data to a folder, a file "
                "or a hub id"
            )
        return self.config.task.data or self.hub

    @cached_property
    def parts(self) -> tuple[list[Part], list[Part]]:
        """The raw rows to train on and to test on; the latter are empty without a test split."""
        splits = load_splits(self.data)
        section = self.config.task
        train, test = pick_splits(splits, section.train_split, section.test_split, self.data)
        return [self.part(splits, train)], [self.part(splits, test)] if test else []

    def part(self, splits: dict[str, Dataset], name: str) -> Part:
        """Return a split as a part."""
        return Part(splits[name], f"{self.data}, split '{name}'")

    # -------------------------------------------------------------------- classes and groups
    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the scores."""
        asked = words(self.config.task.classes) or self.default_classes
        if asked and asked != ("all",):
            return self._at_least_two(asked)
        if self.own_data:
            raise ConfigError(
                f"own-data = '{self.data}': a node's own examples need not show every class of the run, "
                "so the run has to name them: set task.classes=NAME,NAME,… on the server"
            )
        if not asked:
            self._refuse_measures()
        return self._at_least_two(self._known_classes)

    def _at_least_two(self, classes: tuple[str, ...]) -> tuple[str, ...]:
        if len(classes) < 2:
            raise ConfigError(
                f"task.data = '{self.data}': the classes are {some(classes) or 'none'}; at least two "
                "are needed (task.label-column, task.classes)"
            )
        return classes

    def _refuse_measures(self) -> None:
        """Refuse a label column with too many different values to be classes."""
        parts = self.parts[0]
        column, rows = self._label_column(parts[0]), sum(len(part.rows) for part in parts)
        declared = isinstance(parts[0].rows.features[column], ClassLabel)
        if not declared and (count := len(self._known_classes)) > max(MANY, rows / 4):
            raise ConfigError(
                f"{parts[0].where}: column '{column}' has {count} different values in {rows} rows; is "
                "it a label? Choose another by task.label-column=NAME, or say task.classes=all"
            )

    @cached_property
    def _known_classes(self) -> tuple[str, ...]:
        """All classes of the training rows: a class feature's names, or the values that occur."""
        return names_in([(p, self._label_column(p)) for p in self.parts[0]])

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups; empty if rows have no groups."""
        asked = self._asked_groups
        named = [part.group for part in self.parts[0] if part.group]
        columns = [(p, c) for p in self.parts[0] if (c := self._group_column(p))]
        known = tuple(dict.fromkeys(named)) or names_in(columns)
        if self.own_data:
            return known  # a node's own data need not have every group
        if not known and asked:
            raise ConfigError(
                f"{self.parts[0][0].where}: no column says which group a row belongs to; there are "
                f"{', '.join(self.parts[0][0].rows.column_names)}; name it by task.group-column=NAME"
            )
        if not asked or asked == ("all",):
            return known
        if unknown := [name for name in asked if name not in known]:
            raise ConfigError(
                f"task.groups = '{', '.join(asked)}': {self.parts[0][0].where} has no '{unknown[0]}'; "
                f"there are {', '.join(known)}"
            )
        return asked

    @property
    def _asked_groups(self) -> tuple[str, ...]:
        return words(self.config.task.groups) or self.default_groups

    def _label_column(self, part: Part) -> str:
        given = self.config.task.label_column
        return _column_of_names(given, self.labels, part, "task.label-column")

    def _group_column(self, part: Part) -> str:
        given = self.config.task.group_column
        if part.group or not (given or self.group_columns):
            return ""
        if not given and not any(set(c) <= set(part.rows.column_names) for c in self.group_columns):
            return ""
        return _column_of_names(given, self.group_columns, part, "task.group-column")

    def input_columns(self, part: Part) -> tuple[str, ...]:
        """Return the columns of inputs."""
        given = self.config.task.input_columns
        return pick_columns(given, self.inputs, part, "task.input-columns")

    def columns_to_predict(self, part: Part) -> tuple[str, ...]:
        """Return the columns of inputs in a table without labels."""
        return self.input_columns(part)

    def is_complete(self, cells: Mapping[str, Any]) -> bool:
        """Return whether a row's inputs are an example; a row that is none is left out."""
        return True

    def recall(self, folder: Path) -> None:
        """Take the classes from a run folder."""
        self.classes = tuple(read_json(folder / "classes.json")["classes"])

    def inputs_of(self, part: Part, file: str, columns: Sequence[str] = ()) -> Inputs:
        """Return the encoded inputs of rows without labels.

        Parameters
        ----------
        part : Part
        file : str
            What they are called; rows of a table are numbered from 0.
        columns : Sequence[str]
            The columns of a file that is no table but one input.
        """
        used, count = columns or self.columns_to_predict(part), len(part.rows)
        if not count:
            raise ConfigError(f"{file} has no rows to predict on")
        # Only the used columns, since others may hold what cannot be decoded.
        cells = part.rows.select_columns(list(used))[:]
        encoded = self.encoder.encode(cells, range(count), part.where)
        features = Features({**self.encoder.features, "label": Value("int64")})
        rows = Dataset.from_dict({**encoded, "label": [0] * count}, features=features)
        names = [file if columns else f"{file}:{row}" for row in range(count)]
        return Inputs(names, Examples.of(Table(rows, self.encoder.collate)))

    # ------------------------------------------------------------------------- encoded rows
    def encode(self, part: Part) -> Dataset:
        """Encode a part's rows of the chosen classes and groups, once a machine."""
        encoder, inputs = self.encoder, self.input_columns(part)
        label, group = self._label_column(part), self._group_column(part)
        known = self._known_classes
        if self.own_data and label:
            self._refuse_other_classes(part, label)
        elif missing := [name for name in self.classes if name not in known]:
            raise ConfigError(
                f"class '{missing[0]}' is not in {part.where}; there are {some(known)} (task.classes)"
            )
        read_label = NameReader(part, label, known, self.classes or known)
        read_group = NameReader(
            part, group, names_in([(part, group)] if group else []), self.groups
        )
        every_group = self._asked_groups in ((), ("all",))

        def make(columns: Columns, rows: list[int]) -> Columns:
            labels = read_label(columns[label], rows) if label else [0] * len(rows)
            groups = (
                read_group(columns[group], rows) if group else [self._own_group(part)] * len(rows)
            )
            if every_group:
                groups = [UNSEEN if found is None else found for found in groups]
            chosen = [
                i
                for i, pair in enumerate(zip(labels, groups, strict=True))
                if None not in pair and self.is_complete({n: columns[n][i] for n in inputs})
            ]
            wanted = {name: [columns[name][i] for i in chosen] for name in inputs}
            encoded = encoder.encode(wanted, [rows[i] for i in chosen], part.where)
            return {
                **encoded,
                "label": [labels[i] for i in chosen],
                "group": [groups[i] for i in chosen],
            }

        features = Features({**encoder.features, "label": Value("int64"), "group": Value("int32")})
        key = (
            FORMAT,
            inputs,
            label,
            group,
            known,
            self.classes,
            self.groups,
            every_group,
            part.group,
            encoder.key,
        )
        return kept(part, make, features, key)

    def _refuse_other_classes(self, part: Part, column: str) -> None:
        """Refuse a node's own data if a class in them is not one of the run's."""
        feature = part.rows.features[column]
        values = part.rows.data.column(column).unique().to_pylist()
        if isinstance(feature, ClassLabel):
            # A number without a name is refused later, where its row is known.
            values = [feature.names[v] for v in values if v in range(len(feature.names))]
        found = sorted(str(value) for value in values if value is not None)
        if other := [name for name in found if name not in self.classes]:
            raise ConfigError(
                f"own-data: {part.where} has examples of class {some(other)}; the run's classes are "
                f"{some(self.classes)} (task.classes); rename them, or leave these examples out"
            )

    def _own_group(self, part: Part) -> int | None:
        if not part.group:
            return 0
        return self.groups.index(part.group) if part.group in self.groups else None

    @cached_property
    def _tables(self) -> tuple[Table, Table | None]:
        def table(parts: Sequence[Part]) -> Table:
            return Table(join_parts([self.encode(part) for part in parts]), self.encoder.collate)

        train, test = self.parts
        found = table(train), table(test) if test else None
        present = np.unique(found[0].column("group"))
        classes = f"the classes {some(self.classes)}" if self.classes else "complete rows"
        if empty := [name for i, name in enumerate(self.groups) if i not in present]:
            raise ConfigError(
                f"{train[0].where}: no examples of '{empty[0]}' among {classes}; leave it out "
                "(task.groups) or choose other classes"
            )
        if not len(found[0]) or (found[1] is not None and not len(found[1])):
            raise ConfigError(f"{self.data}: no examples of {classes} to train or to test on")
        return found

    @cached_property
    def _held_out(self) -> int | None:
        """The position of the group that no client trains on among all groups; None without one."""
        name = self.config.task.holdout_group
        if not name or (self.own_data and name not in self.groups):
            return None
        if name not in self.groups or len(self.groups) < 2:
            raise ConfigError(
                f"task.holdout-group = '{name}': it should be one of two or more groups; there are "
                f"{', '.join(self.groups) or 'none'}{nearest(name, self.groups)}"
            )
        return self.groups.index(name)

    @cached_property
    def _shares(self) -> tuple[np.ndarray, np.ndarray]:
        """The training table's rows to train on and those to test on, if no test split has any."""
        train, test = self._tables
        order = np.arange(len(train))
        if self._held_out is not None:
            held_out = train.column("group") == self._held_out
            return order[~held_out], order[held_out]
        if test is not None:
            return order, order[:0]
        # The split is the same for every run, so that runs of different seeds can be compared.
        drawn = np.random.default_rng(0).permutation(len(train))
        cut = max(1, round(self.config.task.test_share * len(train)))
        return np.sort(drawn[cut:]), np.sort(drawn[:cut])

    @cached_property
    def _indices(self) -> list[np.ndarray]:
        train, (mine, _) = self._tables[0], self._shares
        groups = train.column("group")[mine] if self.groups else None
        names = self.groups
        if groups is not None and (gone := self._held_out) is not None:
            # The groups behind it move up.
            names, groups = names[:gone] + names[gone + 1 :], groups - (groups > gone)
        parts = partition_indices(train.column("label")[mine], self.config, groups, names)
        return [mine[part] for part in parts]

    def partition(self, partition_id: int) -> Examples:
        """Return one client's rows."""
        return Examples(self._tables[0], self._indices[partition_id])

    def fingerprint(self) -> str:
        """Return the identity of the data: a digest of all rows to train on and to test on."""
        tables = [table for table in self._tables if table is not None]
        # Computed once a machine, since it takes a pass over all rows.
        known = {"rows": [table.rows._fingerprint for table in tables]}
        found = prepared(
            known, lambda: {"digests": np.array([Examples.of(t).digest() for t in tables])}
        )
        return content_digest(*found["digests"].tolist())

    def own_examples(self) -> Examples:
        """Return all of a node's own training rows; none are held out for the server."""
        encoded = [rows for part in self.parts[0] if len(rows := self.encode(part))]
        if not encoded:
            raise ConfigError(f"own-data = '{self.data}' holds no examples for this run")
        found = Examples.of(Table(join_parts(encoded), self.encoder.collate))
        if self._held_out is None:
            return found
        found = found.select(np.flatnonzero(found.column("group") != self._held_out))
        if not len(found):
            raise ConfigError(
                f"own-data = '{self.data}' holds examples of '{self.config.task.holdout_group}' alone, "
                "which the run holds out (task.holdout-group)"
            )
        return found

    def test_examples(self) -> Examples:
        """Return the server's test set."""
        train, test = self._tables
        if test is None:
            return Examples(train, self._shares[1])
        rows = np.arange(len(test))
        if self._held_out is not None:
            rows = np.flatnonzero(test.column("group") == self._held_out)
        return Examples(test, rows) if len(rows) else Examples(train, self._shares[1])


def _column_of_names(
    given: str, candidates: Sequence[tuple[str, ...]], part: Part, key: str
) -> str:
    column = pick_columns(given, candidates, part, key)[0]
    fits = isinstance(part.rows.features[column], Value | ClassLabel)
    require_type(part, column, fits, "names or numbers", key)
    return column
