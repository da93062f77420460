"""Read data sets from the hub or from local files, and keep the encoded rows.

Everything goes through the `datasets` library. Tables are memory-mapped Arrow files that the processes
of a machine share. Rows that were decoded or tokenised once are found again by a fingerprint.
"""

from __future__ import annotations

import csv
import glob
import gzip
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from datasets import (
    Dataset,
    DatasetDict,
    DownloadManager,
    Features,
    Value,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import FILES_TO_IGNORE
from datasets.fingerprint import Hasher
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from filelock import FileLock
from PIL import Image as Pixels

from layerfed.config import ConfigError
from layerfed.config.section import words
from layerfed.models.block_finder import some

__all__ = [
    "CHANGED",
    "READERS",
    "TEST_SPLITS",
    "TRAIN_SPLITS",
    "Part",
    "changed",
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
]

# Kinds of tables, by suffix; those with a separator are read here, as text.
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
SEPARATORS = {".csv": ",", ".tsv": "\t"}
# The library decodes JSON, and finds what is not UTF-8, if the encoding has a name other than utf-8.
STRICT = {"encoding": "utf8"}
# Owner, name and, if a data set has subsets, the name of one.
HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w.-]+))?")
# What systems leave in folders of images.
LITTER = ("Thumbs.db", "desktop.ini")
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


def local_path(data: str) -> Path | None:
    """Return the file or folder that `task.data` names, or None for a hub id.

    Raises
    ------
    ConfigError
        If it is neither an existing path nor of the form of a hub id.
    """
    # A path that the system refuses, such as one that is too long, does not exist either.
    path = os.path.expanduser(data)
    if os.path.exists(path):
        return Path(path).resolve()
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
    check_cache()
    found: Dataset | DatasetDict | dict[str, Dataset]
    try:
        if path is None:
            found = _load_from_hub(data, subset, revision)
        elif path.is_file():
            return {"train": load_file_list([path])}
        else:
            inside = path / subset if subset and (path / subset).is_dir() else path
            found = load_from_disk(str(inside)) if is_saved(inside) else _load_folder(inside)
    except ConfigError:
        raise
    except Exception as error:  # the library raises many types; the user needs the reason only
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from error
        raise ConfigError(_unreadable(data, subset, revision, path, error)) from error
    return {"train": found} if isinstance(found, Dataset) else dict(found)


def _load_from_hub(data: str, subset: str, revision: str | None) -> dict[str, Dataset]:
    name = HUB_ID.fullmatch(data)
    assert name  # `local_path` refuses everything else
    if revision is None:
        found = load_dataset_builder(name[1], subset or name[2])
    else:
        # The hub's own conversions have no card, so the library does not know their subsets.
        found = load_dataset_builder(name[1], data_dir=subset, revision=revision)
    if isinstance(found, Csv):
        return _load_text_tables(found)
    found.download_and_prepare()
    return dict(found.as_dataset())


def check_cache() -> Path:
    """Return the folder for encoded rows, in that of the `datasets` library.

    Raises
    ------
    ConfigError
        If it cannot be written.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "layerfed"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ConfigError(
            f"the cache for data, {folder}, cannot be written: {error.strerror}; set "
            "HF_DATASETS_CACHE to a folder that can"
        ) from None


def is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote a folder."""
    return any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))


def data_files(folder: Path) -> list[Path]:
    """Return the tables in a folder and its subfolders, in order."""
    found = (file for _, files in walk(folder) for file in files)
    return sorted(file for file in found if file.suffix.lower() in READERS)


def load_file_list(files: Sequence[Path]) -> Dataset:
    """Read files of one kind and schema as one table.

    Raises
    ------
    ConfigError
        If they are of an unknown kind, or cannot be read.
    """
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) != 1 or not kinds <= READERS.keys():
        raise ConfigError(
            f"{some([str(f) for f in files])}: cannot read files of kind {', '.join(sorted(kinds))} as "
            f"one table; give files of one kind of {', '.join(READERS)}"
        )
    kind = kinds.pop()
    check_cache()
    try:
        if kind in SEPARATORS:
            return _load_text_table(files, SEPARATORS[kind])
        return _load_typed(files, READERS[kind])
    except Exception as error:  # the library raises many types; the user needs the reason only
        refused = error.__cause__ if isinstance(error.__cause__, ConfigError) else None
        raise refused or ConfigError(
            f"cannot read {some([str(f) for f in files])}: {_reason(error)}"
        ) from error


def _load_typed(files: Sequence[Path], reader: str) -> Dataset:
    """Read files whose cells have types of their own."""
    given: dict[str, Any] = {
        "data_files": {"train": [glob.escape(str(file)) for file in files]},
        "split": "train",
        **(STRICT if reader == "json" else {}),
    }
    try:
        return load_dataset(reader, **given)
    except datasets.exceptions.DatasetGenerationError:
        if reader != "json":
            raise
    # A column that changes its type is found only within one piece of a file.
    return load_dataset(reader, **given, chunksize=max(file.stat().st_size for file in files) + 1)


def _load_text_table(files: Sequence[Path], separator: str) -> Dataset:
    """Read files of separated values, every cell as the text that the file has."""
    columns = [_header(file, separator) for file in files]
    if other := next((i for i, names in enumerate(columns) if names != columns[0]), 0):
        raise ConfigError(
            f"{files[other]} has the columns {', '.join(columns[other])}, but {files[0]} has "
            f"{', '.join(columns[0])}; give files with the same columns"
        )
    given = {
        "files": [str(file) for file in files],
        "changed": [file.stat().st_mtime_ns for file in files],
        "separator": separator,
    }
    features = Features({name: Value("string") for name in columns[0]})
    return Dataset.from_generator(_rows, features=features, gen_kwargs=given)


def _rows(
    files: Sequence[str], changed: Sequence[int], separator: str
) -> Iterator[dict[str, str | None]]:
    """Yield the rows of files; only an empty cell is missing: a class may be called None or NA."""
    for file in files:
        lines = _lines(Path(file), separator)
        _, names = next(lines)
        header = _names(names)
        for line, cells in lines:
            if len(cells) != len(header):
                more = "more" if len(cells) > len(header) else "fewer"
                advice = "put text with commas in quotes"
                if separator == "\t":
                    advice = (
                        "a TSV file has no quotes; text with tabs or line breaks goes into a CSV"
                    )
                raise ConfigError(
                    f"{file}, line {line}: {len(cells)} fields, {more} fields than the header's "
                    f"{len(header)}; {advice}"
                )
            yield {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _header(file: Path, separator: str) -> list[str]:
    _, names = next(_lines(file, separator), (0, []))
    if not names:
        raise ConfigError(f"{file} is empty; its first line should name the columns")
    columns = _names(names)
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise ConfigError(f"{file}: two columns are called '{twice[0]}'; rename one of them")
    return columns


def _names(header: Sequence[str]) -> list[str]:
    """Return the names of columns; one without a name, such as an index, gets one."""
    return [name or f"unnamed {i}" for i, name in enumerate(header)]


def _lines(file: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the cells of each line that is not blank, with the number of the line."""
    csv.field_size_limit(2**31 - 1)
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        # In a TSV file a quote is a character like any other.
        reader = csv.reader(
            _decoded(stream, file),
            delimiter=separator,
            quoting=csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL,
            strict=True,
        )
        try:
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
        except csv.Error as error:
            raise ConfigError(
                f"{file}, line {reader.line_num}: {error}; write a quote inside quotes twice, and end "
                "lines as Unix or Windows does"
            ) from None


def _decoded(stream: Iterable[bytes], file: Path) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{file}, line {number}: byte 0x{line[error.start]:02x} is not UTF-8; save the table as "
                "UTF-8"
            ) from None


def _load_folder(folder: Path) -> dict[str, Dataset]:
    """Read a folder in the hub's layout."""
    with _as_it_is():
        found = load_dataset_builder(str(folder))
        if not _names_files(folder / "README.md"):
            _refuse_unread(folder, found.config.data_files or {})
        if isinstance(found, Csv):
            return _load_text_tables(found)
        # The library caches a folder with a card by its name, even if its files have changed, unless
        # they are named one by one.
        files = {
            str(split): [glob.escape(name) for name in names]
            for split, names in (found.config.data_files or {}).items()
        }
        more = STRICT if isinstance(found, Json) else {}
        return dict(load_dataset(str(folder), found.config.name, data_files=files, **more))


def _names_files(card: Path) -> bool:
    """Return whether a folder's card says which of its files are read."""
    return card.is_file() and "data_files" in card.read_text(encoding="utf-8", errors="replace")


def _refuse_unread(folder: Path, chosen: Mapping[Any, Sequence[str]]) -> None:
    """Refuse tables that `datasets` leaves out: of a rarer kind, or without a split."""
    read = {Path(name).resolve() for names in chosen.values() for name in names}
    unread = [
        file
        for file in data_files(folder)
        if file.resolve() not in read and file.name not in FILES_TO_IGNORE
    ]
    if read and unread:
        raise ConfigError(
            f"{some([str(file) for file in unread])} would not be read beside {min(read).name}; give "
            "files of one kind, whose names all tell their split, as in train.csv, or none does"
        )


def _load_text_tables(found: Csv) -> dict[str, Dataset]:
    """Read the splits of a data set of separated values, of a folder or of the hub."""
    files = {str(split): list(names) for split, names in (found.config.data_files or {}).items()}
    here = DownloadManager().download(files)
    return {
        split: _load_text_table([Path(name) for name in names], found.config.sep)
        for split, names in here.items()
    }


@contextmanager
def _as_it_is() -> Iterator[None]:
    """Let `datasets` take a folder's path as it is, not as a pattern."""
    library = datasets.data_files
    resolve = library.resolve_pattern

    def literally(pattern: str, base_path: str, *args: Any, **more: Any) -> list[str]:
        # Paths on the hub have a protocol, and no such characters.
        base = base_path if "://" in base_path else glob.escape(base_path)
        found: list[str] = resolve(pattern, base, *args, **more)
        return found

    library.resolve_pattern = literally
    try:
        yield
    finally:
        library.resolve_pattern = resolve


def walk(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield each folder below and including a root with its files, both in order.

    Links are followed. What is hidden (`.name`) is left out: notebooks, macOS and downloads leave copies
    there.

    Raises
    ------
    ConfigError
        If a folder cannot be read, or holds a link to itself.
    """

    def refuse(error: OSError) -> None:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}")

    for folder, inside, files in os.walk(root, onerror=refuse, followlinks=True):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        real = Path(folder).resolve()
        for name in inside:
            path = Path(folder, name)
            if path.is_symlink() and real.is_relative_to(path.resolve()):
                raise ConfigError(f"{path} links to a folder that it is in; remove the link")
        yield Path(folder), [Path(folder, n) for n in sorted(files) if not n.startswith(".")]


def image_folders(root: Path) -> dict[tuple[str, ...], list[Path]]:
    """Return the images below a folder, by the path of their own folder relative to it.

    Raises
    ------
    ConfigError
        If a folder for images has a file that is none, or no file: its class would silently vanish.
    """
    found: dict[tuple[str, ...], list[Path]] = {}
    others: dict[tuple[str, ...], list[Path]] = {}
    for folder, files in walk(root):
        inside = folder.relative_to(root).parts
        images = [file for file in files if file.suffix.lower() in image_suffixes()]
        if images:
            found[inside] = images
        others[inside] = [f for f in files if f not in set(images) and f.name not in LITTER]
    # A folder of folders with images, such as the root, may hold anything: a README, say.
    above = {path[:depth] for path in found for depth in range(len(path))}
    for inside, left in others.items() if found else ():
        if inside in above - found.keys():
            continue
        if left:
            raise ConfigError(
                f"{left[0]} is not an image of a kind that can be read, such as .jpg or .png; convert "
                f"it, or move it out of {root}"
            )
        if inside not in found:
            raise ConfigError(
                f"{root.joinpath(*inside)} holds no images; add some, or remove the folder"
            )
    return found


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of all kinds of images that Pillow reads."""
    kinds = Pixels.registered_extensions()
    return frozenset(suffix for suffix, kind in kinds.items() if kind in Pixels.OPEN)


def image_rows(files: Mapping[str, Sequence[Path]]) -> Dataset:
    """Return a table of image paths with their labels; a changed file changes its fingerprint."""
    paths = [path for images in files.values() for path in images]
    return Dataset.from_dict(
        {
            "image": [str(path) for path in paths],
            "label": [label for label, images in files.items() for _ in images],
            CHANGED: [changed(path) for path in paths],
        }
    )


def changed(path: str | Path) -> int:
    """Return the modification time of a file, or 0 for what is none; a row names it when it is read."""
    # A text that is too long for a path counts as a path that does not exist.
    return os.stat(path).st_mtime_ns if os.path.isfile(path) else 0


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
    folder = check_cache()
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
