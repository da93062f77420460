"""News classification in five languages, one language a client: XGLUE-NC [S, section V].

A news item has a title, a body, and one of ten categories; languages are en, de, es, fr and ru. XGLUE
has training examples in English only, so the authors' code trains on each language's validation split
and tests on its test split [C]. This task does the same if the data have splits by language.

`microsoft/xglue` on the hub is a script, which `datasets` no longer runs; `hgissbkh/xglue` holds the
same data as parquet (subset `nc`, splits `validation.de` …). Local data are files with the split and the
language in their paths (`nc/validation.de-00000-of-00001.parquet`, `de/train.tsv`), or tables with a
column `language`, such as MasakhaNEWS and SIB-200.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from datasets import Dataset
from torch import nn

from layerfed.config import ConfigError
from layerfed.config.section import words
from layerfed.models.text import build_text_classifier
from layerfed.task.loading import (
    TEST_SPLITS,
    TRAIN_SPLITS,
    Part,
    data_files,
    load_file_list,
    load_splits,
    local_path,
    pick_splits,
)
from layerfed.task.text import TextTask

LANGUAGES = ("en", "de", "es", "fr", "ru")
CLASSES = 10


class XglueNc(TextTask):
    """News classification with one language a client."""

    hub: ClassVar[str] = "hgissbkh/xglue:nc"
    inputs: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("news_title", "news_body"),
        ("headline", "text"),
        ("text",),
    )
    labels: ClassVar[tuple[tuple[str, ...], ...]] = (("news_category",), ("label",), ("category",))
    group_columns: ClassVar[tuple[tuple[str, ...], ...]] = (("language",), ("lang",))

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages to look for in the names of splits and files."""
        asked = words(self.config.task.groups)
        return LANGUAGES if asked in ((), ("all",)) else asked

    @cached_property
    def parts(self) -> tuple[list[Part], list[Part]]:
        """One part for each language in the names of splits or files; without any, one with a column."""
        path = local_path(self.data)
        if path is not None and path.is_dir():
            # The repository has other subsets than `nc` with splits by language.
            by_language = self._files(path / "nc" if (path / "nc").is_dir() else path)
        else:
            by_language = self._splits(load_splits(self.data))
        if not by_language:
            return super().parts
        section = self.config.task
        first = section.train_split or ("validation" if "validation" in by_language else "train")
        train, test = pick_splits(by_language, first, section.test_split, self.data)
        missing = [name for name in self.languages if name not in by_language[train]]
        if missing and not self.own_data:
            raise ConfigError(
                f"{self.data}, split '{train}' has no language '{missing[0]}'; there are "
                f"{', '.join(by_language[train])}; choose by task.groups=NAME,NAME, or another split by "
                "task.train-split"
            )
        return list(by_language[train].values()), list(by_language[test].values()) if test else []

    def skeleton(self) -> nn.Module:
        """Return the layers without their weights, and without reading data if they are XGLUE's."""
        section = self.config.task
        given = section.data or section.classes
        count = len(self.classes) if given else CLASSES
        return build_text_classifier(self.config.model, count, self.config.run.seed, skeleton=True)

    def _splits(self, splits: Mapping[str, Dataset]) -> dict[str, dict[str, Part]]:
        """Read splits named `validation.de`."""
        found: dict[str, dict[str, Part]] = {}
        for name, rows in splits.items():
            split, _, language = name.partition(".")
            if language in self.languages:
                part = Part(rows, f"{self.data}, split '{name}'", language)
                found.setdefault(split, {})[language] = part
        return found

    def _files(self, folder: Path) -> dict[str, dict[str, Part]]:
        """Read files whose paths name a split and a language."""
        files: dict[str, dict[str, list[Path]]] = {}
        for file in data_files(folder):
            path = file.relative_to(folder).as_posix()
            parts = {*re.split(r"[^\w]+", path), *re.split(r"[\W_]+", path)}
            language = next((name for name in self.languages if name in parts), None)
            split = next((name for name in (*TRAIN_SPLITS, *TEST_SPLITS) if name in parts), None)
            if language and split:
                files.setdefault(split, {}).setdefault(language, []).append(file)
        return {
            split: {
                language: Part(
                    load_file_list(those), f"{folder}, {split} files of {language}", language
                )
                for language, those in by_language.items()
            }
            for split, by_language in files.items()
        }
