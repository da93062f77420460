"""Read data sets from the hub or from local files, and keep the encoded rows.

Everything goes through the `datasets` library. Tables are memory-mapped Arrow files that the processes
of a machine share. Rows that were decoded or tokenised once are found again by a fingerprint.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.fingerprint import Hasher
from datasets.packaged_modules.csv.csv import Csv
from filelock import FileLock

from layerfed.config import ConfigError
from layerfed.models.block_finder import some

__all__ = [
    "CHANGED",
    "TEST_SPLITS",
    "TRAIN_SPLITS",
    "Part",
    "data_files",
    "download",
    "image_folders",
    "image_rows",
    "is_saved",
    "is_text",
    "kept",
    "load_file_list",
    "load_splits",
    "local_path",
    "pick_columns",
    "pick_splits",
    "require_type",
    "words",
]

# Only an empty cell is a missing value: a class may be called None, and a region NA.
CSV = {"keep_default_na": False, "na_values": [""]}
READERS = {
    ".parquet": ("parquet", {}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", CSV),
    ".tsv": ("csv", {**CSV, "sep": "\t"}),
}
# Owner, name and, if a data set has subsets, the name of one.
HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w.-]+))?")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# A column with the modification times of a table's image files. Nothing reads it, but it changes the
# table's fingerprint when a file changes.
CHANGED = "__changed__"
# Names of splits, in upper or lower case; the first that exists is used.
TRAIN_SPLITS = ("train", "training")
TEST_SPLITS = ("test", "testing", "eval", "validation", "valid", "val", "dev")


@dataclass(frozen=True)
class Part:
    """Rows of one schema.

    Attributes
    ----------
    rows : datasets.Dataset
    where : str
        The name of the source, for messages.
    group : str
        The group of all rows; empty if a column holds each row's group.
    """

    rows: Dataset
    where: str
    group: str = ""


def words(text: str) -> tuple[str, ...]:
    """Split a setting at its commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def local_path(data: str) -> Path | None:
    """Return the file or folder that `task.data` names, or None for a hub id.

    Raises
    ------
    ConfigError
        If it is neither an existing path nor of the form of a hub id.
    """
    path = Path(data).expanduser()
    if path.exists():
        return path.resolve()
    if HUB_ID.fullmatch(data):
        return None
    raise ConfigError(
        f"task.data = '{data}' does not exist, and is not of the form of a hub id (owner/name or "
        "owner/name:subset); give a file, a folder or a hub id"
    )


def load_splits(data: str, subset: str = "", revision: str | None = None) -> dict[str, Dataset]:
    """Read all splits of a data set.

    Parameters
    ----------
    data : str
        A hub id, with `:subset` if the data set has subsets; a folder (in the hub's layout, in that of
        `save_to_disk`, or of images); or a file.
    subset : str
        Name of a configuration on the hub, for a task that reads several data sets. Locally it names
        a folder inside `data`, if there is one.
    revision : str, optional
        Branch of the hub's repository, in which the subset is a folder.

    Raises
    ------
    ConfigError
        If there is nothing to read, or the hub cannot be reached. The message says what to do.
    """
    path = local_path(data)
    try:
        if path is None:
            name = HUB_ID.fullmatch(data)
            assert name  # `local_path` refuses everything else
            if revision is None:
                found = load_dataset(name[1], subset or name[2])
            else:
                # The hub's own conversions have no card, so the library does not know their subsets.
                found = load_dataset(name[1], data_dir=subset, revision=revision)
        elif path.is_file():
            return {"train": load_file_list([path])}
        else:
            inside = path / subset if subset and (path / subset).is_dir() else path
            found = load_from_disk(str(inside)) if is_saved(inside) else _load_folder(inside)
    except ConfigError:
        raise
    except Exception as error:  # the library raises many types; the user needs the reason only
        raise ConfigError(_unreadable(data, subset, revision, path, error)) from error
    return {"train": found} if isinstance(found, Dataset) else dict(found)


def is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote a folder."""
    return any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))


def data_files(folder: Path) -> list[Path]:
    """Return the tables in a folder and its subfolders, in order."""
    return sorted(f for f in folder.rglob("*") if f.suffix in READERS and f.is_file())


def load_file_list(files: Sequence[Path]) -> Dataset:
    """Read files of one kind and schema as one table.

    Raises
    ------
    ConfigError
        If they are of an unknown kind, or cannot be read.
    """
    kinds = {file.suffix for file in files}
    if len(kinds) != 1 or not kinds <= READERS.keys():
        raise ConfigError(
            f"{some([str(f) for f in files])}: cannot read files of kind {', '.join(sorted(kinds))} as "
            f"one table; give files of one kind of {', '.join(READERS)}"
        )
    reader, options = READERS[kinds.pop()]
    names = [str(file) for file in files]
    try:
        found = load_dataset(reader, data_files={"train": names}, split="train", **options)
    except Exception as error:  # the library raises many types; the user needs the reason only
        raise ConfigError(f"cannot read {some(names)}: {_reason(error)}") from error
    if reader == "csv":
        _refuse_shifted(found, some(names))
    return found


def _load_folder(folder: Path) -> DatasetDict:
    """Read a folder in the hub's layout, and its CSV and TSV files as single files are read."""
    found = load_dataset_builder(str(folder))
    # The library caches a folder with a card by its name, even if its files have changed, unless they
    # are named one by one.
    files = {str(split): list(names) for split, names in (found.config.data_files or {}).items()}
    separated = isinstance(found, Csv)
    splits = load_dataset(
        str(folder), found.config.name, data_files=files, **(CSV if separated else {})
    )
    for split, rows in splits.items() if separated else ():
        _refuse_shifted(rows, f"{folder}, split '{split}'")
    return splits


def _refuse_shifted(rows: Dataset, where: str) -> None:
    """Refuse a table whose lines have more fields than its header, which pandas reads as an index."""
    if any(name.startswith("__index_level_") for name in rows.column_names):
        raise ConfigError(
            f"{where}: lines have more fields than the header, so columns are unknown; put text with "
            "commas in quotes"
        )


def image_folders(root: Path) -> dict[tuple[str, ...], list[Path]]:
    """Return the images below a folder, by the path of their own folder relative to it."""
    found: dict[tuple[str, ...], list[Path]] = {}
    for folder, inside, files in os.walk(root):
        inside.sort()
        images = [Path(folder, name) for name in sorted(files) if name.lower().endswith(IMAGES)]
        if images:
            found[Path(folder).relative_to(root).parts] = images
    return found


def image_rows(files: Mapping[str, Sequence[Path]]) -> Dataset:
    """Return a table of image paths with their labels; a changed file changes its fingerprint."""
    paths = [path for images in files.values() for path in images]
    return Dataset.from_dict(
        {
            "image": [str(path) for path in paths],
            "label": [label for label, images in files.items() for _ in images],
            CHANGED: [path.stat().st_mtime_ns for path in paths],
        }
    )


def _reason(error: Exception) -> str:
    """Return the first line of an error's message, or of its cause's."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0].rstrip('.') if lines else 'no more is said'}"


def download(repository: str, folder: str, revision: str | None = None, subset: str = "") -> str:
    """Return the command that downloads a data set, or a subset that is a folder of it."""
    chosen = f" --revision {revision}" * bool(revision) + f" --include '{subset}/*'" * bool(subset)
    return f"`hf download {repository} --repo-type dataset{chosen} --local-dir {folder}`"


def _unreadable(
    data: str, subset: str, revision: str | None, path: Path | None, error: Exception
) -> str:
    if path is not None:
        return f"cannot read task.data = '{data}': {_reason(error)}"
    repository, _, named = data.partition(":")
    # A task that reads several data sets expects them as folders in one.
    beside = f"DIR/{repository.rpartition('/')[2]}" if subset else "DIR"
    return (
        f"cannot load '{data}'{f' ({subset})' if subset else ''}, which is no file or folder here, from "
        f"the hub: {_reason(error)}. On a machine with a network, run "
        f"{download(repository, beside, revision, named)}, and set task.data=DIR"
        + f"/{named}"
        * bool(named)
    )


def pick_splits(
    splits: Mapping[str, object], train: str, test: str, where: str
) -> tuple[str, str | None]:
    """Return the splits to train and to test on; None for the second holds some of the first out.

    Raises
    ------
    ConfigError
        If a split that is asked for does not exist.
    """
    for key, name in (("train", train), ("test", test)):
        if name and name not in splits:
            raise ConfigError(
                f"task.{key}-split = '{name}', but {where} has no such split; there are "
                f"{', '.join(splits)}"
            )
    first = train or next(_named(TRAIN_SPLITS, splits), "")
    if not first:
        if len(splits) != 1:
            raise ConfigError(
                f"{where} has no split 'train'; name the one to train on: task.train-split, of "
                f"{', '.join(splits)}"
            )
        first = next(iter(splits))
    second = test or next((name for name in _named(TEST_SPLITS, splits) if name != first), None)
    return first, None if second == first else second


def _named(names: Sequence[str], splits: Mapping[str, object]) -> Iterator[str]:
    """Yield the splits that have one of some names, in the order of the names."""
    return (split for name in names for split in splits if split.lower() == name)


def pick_columns(
    given: str, candidates: Sequence[tuple[str, ...]], part: Part, key: str
) -> tuple[str, ...]:
    """Return the columns that a setting names, or the first candidates that exist.

    Raises
    ------
    ConfigError
        If a column does not exist. The message lists the existing ones.
    """
    there = part.rows.column_names
    named = words(given)
    for columns in [named] if named else candidates:
        if set(columns) <= set(there):
            return columns
    wanted = (
        f"column '{next(c for c in named if c not in there)}', named by {key}, is missing"
        if named
        else f"none of the columns {' / '.join('+'.join(c) for c in candidates)} is there"
    )
    raise ConfigError(f"{part.where}: {wanted}; there are {', '.join(there)}; choose by {key}=NAME")


def require_type(part: Part, column: str, fits: bool, wanted: str, key: str) -> None:
    """Refuse a column whose type does not fit.

    Raises
    ------
    ConfigError
        If it does not fit. The message names the column and its type.
    """
    if not fits:
        feature = part.rows.features[column]
        raise ConfigError(
            f"{part.where}: column '{column}' is of type {getattr(feature, 'dtype', feature)}, not "
            f"{wanted}; choose another by {key}=NAME"
        )


def is_text(part: Part, column: str) -> bool:
    """Return whether a column holds strings."""
    return getattr(part.rows.features[column], "dtype", "") in ("string", "large_string")


def kept(
    part: Part,
    make: Callable[[dict[str, list[Any]], list[int]], dict[str, list[Any]]],
    features: Features,
    key: object,
) -> Dataset:
    """Return the result of `make` for a part's rows, computed once on this machine.

    Parameters
    ----------
    part : Part
    make : Callable
        Gets a batch's columns by name and its row numbers; may return fewer rows.
    features : datasets.Features
        The result's features.
    key : object
        Everything that the result depends on besides the rows.

    Notes
    -----
    Results are in the folder `layerfed` of the `datasets` cache (`HF_DATASETS_CACHE`). A lock makes sure
    that several clients that start on one machine do the work once.
    """
    # The library's own fingerprint of `make` would change with the state of a tokenizer or an address.
    fingerprint = Hasher.hash((part.rows._fingerprint, key))
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "layerfed"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{fingerprint}.lock"):
        return part.rows.map(
            make,
            batched=True,
            with_indices=True,
            batch_size=256,
            remove_columns=part.rows.column_names,
            features=features,
            cache_file_name=str(folder / f"{fingerprint}.arrow"),
            new_fingerprint=fingerprint,
            desc=f"preparing {part.where}",
        )
