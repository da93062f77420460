"""Multiple choice as classification, one data set a client [S, section V].

The data sets are SciQ, OpenbookQA, PIQA, ARC-Easy and ARC-Challenge, in the hub's schemas. A causal
language model reads the question with its lettered choices. The class scores are its scores of the
letters at the answer's position. The head, which every client trains, has the output layer's rows for
these letters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, Value
from torch import Tensor, nn

from layerfed.config import ConfigError
from layerfed.config.section import words
from layerfed.models.text import build_choice_model, tokenizer_key
from layerfed.task.base import Batch, Inputs
from layerfed.task.dataset_task import FORMAT, Encoder
from layerfed.task.loading import (
    Part,
    data_files,
    download,
    is_saved,
    kept,
    load_file_list,
    load_splits,
    local_path,
    pick_splits,
)
from layerfed.task.text import TextTask, padded, token_features, tokenised

LETTERS = ("A", "B", "C", "D", "E")
CUE = "Answer:"


@dataclass(frozen=True)
class Question:
    """A question, its choices, and the position of the right one."""

    text: str
    choices: Sequence[str]
    answer: int


@dataclass(frozen=True)
class Source:
    """A data set: where it is on the hub, and how a row becomes a question.

    Attributes
    ----------
    hub, subset : str
        Its id and configuration. Locally the data are a folder inside `task.data`, named by the id or
        by its last part, which holds the files or a folder for the configuration.
    columns : tuple[str, ...]
        The columns that it must have.
    read : Callable
        Turns a row into a question. It gets a generator to draw the order of choices that have none, and
        raises `ValueError` with the reason if the row has no valid answer.
    revision : str, optional
        Branch of the repository.
    """

    hub: str
    subset: str
    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any], np.random.Generator], Question]
    revision: str | None = None


def _sciq(row: Mapping[str, Any], rng: np.random.Generator) -> Question:
    choices = [row["correct_answer"], *(row[f"distractor{i}"] for i in (1, 2, 3))]
    # The right answer has a column of its own, so its place among the choices is drawn at random.
    order = rng.permutation(len(choices))
    return Question(row["question"], [choices[i] for i in order], int(np.argmin(order)))


def _piqa(row: Mapping[str, Any], rng: np.random.Generator) -> Question:
    if row["label"] not in (0, 1):
        raise ValueError(f"label = {row['label']!r} is not allowed: it should be 0 or 1")
    return Question(row["goal"], [row["sol1"], row["sol2"]], row["label"])


def _lettered(row: Mapping[str, Any], rng: np.random.Generator) -> Question:
    choices, key = row["choices"], row["answerKey"]
    held = choices if isinstance(choices, dict) else {}
    labels, texts = held.get("label"), held.get("text")
    if not (isinstance(labels, list) and isinstance(texts, list) and len(labels) == len(texts)):
        raise ValueError(
            f"choices is of type {type(choices).__name__}, and should hold two lists of one length, "
            "label and text"
        )
    if key not in labels:
        raise ValueError(
            f"answerKey = {key!r} is not allowed: it should be one of "
            f"{', '.join(map(repr, labels)) or 'nothing'}"
        )
    if not 2 <= len(texts) <= len(LETTERS):
        raise ValueError(f"choices: {len(texts)} are given, 2 to {len(LETTERS)} are allowed")
    asked = row["question"] if "question" in row else row["question_stem"]
    return Question(asked, texts, labels.index(key))


_ARC = ("question", "choices", "answerKey")
SOURCES: dict[str, Source] = {
    "sciq": Source(
        "allenai/sciq",
        "default",
        ("question", "correct_answer", "distractor1", "distractor2", "distractor3"),
        _sciq,
    ),
    "openbookqa": Source(
        "allenai/openbookqa", "main", ("question_stem", "choices", "answerKey"), _lettered
    ),
    # The repository is a script, which `datasets` no longer runs; this branch holds converted files.
    "piqa": Source(
        "ybisk/piqa", "plain_text", ("goal", "sol1", "sol2", "label"), _piqa, "refs/convert/parquet"
    ),
    "arc-easy": Source("allenai/ai2_arc", "ARC-Easy", _ARC, _lettered),
    "arc-challenge": Source("allenai/ai2_arc", "ARC-Challenge", _ARC, _lettered),
}
# PIQA's test questions have no answers on the hub.
TEST_SPLIT = {"piqa": "validation"}


class QuestionAnswering(TextTask):
    """Five data sets of multiple-choice questions; `task.groups` chooses among them."""

    settings: ClassVar[frozenset[str]] = frozenset(
        {"data", "groups", "holdout_group", "max_tokens", "test_share"}
    )
    smooths: ClassVar[bool] = False
    default_groups: ClassVar[tuple[str, ...]] = tuple(SOURCES)
    default_classes: ClassVar[tuple[str, ...]] = LETTERS

    @cached_property
    def parts(self) -> tuple[list[Part], list[Part]]:
        """One part for each data set; a set with one split is cut by `task.test-share`."""
        asked = words(self.config.task.groups) or self.default_groups
        names = self.default_groups if asked == ("all",) else asked
        if unknown := [name for name in names if name not in SOURCES]:
            raise ConfigError(
                f"task.groups = '{', '.join(names)}': there is no '{unknown[0]}'; choose of "
                f"{', '.join(SOURCES)}"
            )
        train: list[Part] = []
        test: list[Part] = []
        for name in names:
            source = SOURCES[name]
            if self.own_data and not self._holds(source):
                continue
            where, splits = self._load(source)
            first, second = pick_splits(splits, "", "", where)
            if second and TEST_SPLIT.get(name) in splits:
                second = TEST_SPLIT[name]
            kept_back = None if second or self.own_data else self._cut(splits[first])
            for split, role, rows in (
                (first, train, kept_back[0] if kept_back else splits[first]),
                (second or first, test, kept_back[1] if kept_back else splits[second or first]),
            ):
                role.append(Part(rows, f"{where}, split '{split}'", name))
        return train, test

    def _holds(self, source: Source) -> bool:
        """Return whether a node's own data have a folder of that data set, and of its subset."""
        root = local_path(self.config.task.data)
        folder = _folder(root, source) if root is not None and root.is_dir() else None
        if folder is None:
            return False
        if (folder / source.subset).is_dir() or is_saved(folder):
            return True
        # Tables outside any folder belong to the subset; without another subset, so do all tables.
        return any(source.subset == "default" or f.parent == folder for f in data_files(folder))

    def _load(self, source: Source) -> tuple[str, dict[str, Dataset]]:
        data = self.config.task.data
        if not data:
            return source.hub, load_splits(source.hub, source.subset, source.revision)
        root = local_path(data)
        if root is None or not root.is_dir():
            raise ConfigError(
                f"task.data = '{data}' is not a folder; for qa it should hold {', '.join(SOURCES)} in "
                f"folders named as on the hub, such as {source.hub}"
            )
        folder, name = _folder(root, source), source.hub.rpartition("/")[2]
        if folder is None:
            raise ConfigError(
                f"task.data = '{data}' has no folder {name}; run "
                f"{download(source.hub, str(root / name), source.revision)}, or leave it out by "
                "task.groups"
            )
        inside = folder / source.subset
        return str(inside if inside.is_dir() else folder), load_splits(str(folder), source.subset)

    def _cut(self, rows: Dataset) -> tuple[Dataset, Dataset]:
        found = rows.train_test_split(test_size=self.config.task.test_share, seed=0)
        return found["train"], found["test"]

    # ------------------------------------------------------------------------- the letters
    @cached_property
    def letters(self) -> tuple[int, ...]:
        """Token ids of the letters at the position of the answer.

        Raises
        ------
        ConfigError
            If the tokenizer does not have one token for each letter.
        """
        ids = [self._tokens(f"{CUE} {letter}") for letter in LETTERS]
        if any(row[:-1] != ids[0][:-1] for row in ids) or len({row[-1] for row in ids}) < len(ids):
            raise ConfigError(
                f"the tokenizer of model.name = '{self.config.model.name}' has no token of its own for "
                f"each of {', '.join(LETTERS)}; choose another (model.tokenizer)"
            )
        return tuple(row[-1] for row in ids)

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @cached_property
    def start_tokens(self) -> list[int]:
        """The token ids that the tokenizer puts before a text, such as a beginning-of-text token."""
        whole, bare = self.tokenizer("x")["input_ids"], self._tokens("x")
        return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])

    # ------------------------------------------------------------------------- encoded rows
    @cached_property
    def encoder(self) -> Encoder:
        """The encoder that makes right-padded prompts and each prompt's number of choices."""
        pad = self.pad

        def collate(rows: pa.Table) -> dict[str, Tensor]:
            choices = torch.from_numpy(rows.column("choices").to_numpy().copy())
            return {**padded(rows, pad), "choices": choices}

        key = "qa", LETTERS, CUE, self.config.task.max_tokens, tokenizer_key(self.tokenizer)
        features = {**token_features(), "choices": Value("int64")}
        return Encoder(key, features, lambda columns, rows, where: columns, collate)

    def encode(self, part: Part) -> Dataset:
        """Encode a data set's questions, once a machine."""
        source = SOURCES[part.group]
        if missing := [name for name in source.columns if name not in part.rows.column_names]:
            raise ConfigError(
                f"{part.where}: column '{missing[0]}' is missing; there are "
                f"{', '.join(part.rows.column_names)}, and {', '.join(source.columns)} are needed"
            )
        group = self.groups.index(part.group)

        def make(columns: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
            questions = []
            for i, row in enumerate(rows):
                cells = {name: columns[name][i] for name in source.columns}
                try:
                    question = source.read(cells, np.random.default_rng(row))
                    if None in (question.text, *question.choices):
                        raise ValueError("the question or one of its choices is missing")
                except ValueError as error:
                    raise ConfigError(f"{part.where}, row {row}: {error}") from None
                questions.append(question)
            named = [f"{part.where}, row {row}" for row in rows]
            return {
                "input_ids": self._ids(questions, named, part.where),
                "choices": [len(q.choices) for q in questions],
                "label": [q.answer for q in questions],
                "group": [group] * len(rows),
            }

        features = Features(
            {**self.encoder.features, "label": Value("int64"), "group": Value("int32")}
        )
        return kept(part, make, features, (FORMAT, part.group, self.groups, self.encoder.key))

    def _ids(
        self, questions: Sequence[Question], named: Sequence[str], where: str
    ) -> list[list[int]]:
        """Return the token ids of questions, up to the position of the answer's letter."""
        texts = [_prompt(question) for question in questions]
        prompts = tokenised(self.tokenizer, texts, named, add_special_tokens=False)
        if any(tokens[-1] != self.letters[0] for tokens in prompts):
            raise ConfigError(
                f"{where}: the tokenizer of model.name = '{self.config.model.name}' joins the "
                "answer's letter with what precedes it; choose another (model.tokenizer)"
            )
        # The prompt ends with a letter only so that the tokens before it are those of a real answer.
        room = self.config.task.max_tokens - len(self.start_tokens)
        return [self.start_tokens + tokens[:-1][-room:] for tokens in prompts]

    def read(self, file: Path) -> Inputs:
        """Return the questions of a table: `question`, and the choices in columns A, B, … to E."""
        part = Part(load_file_list([file]), str(file))
        there = [letter for letter in LETTERS if letter in part.rows.column_names]
        more = set(ascii_uppercase) - set(LETTERS)
        whole = there == list(LETTERS[: len(there)]) and not more.intersection(
            part.rows.column_names
        )
        if "question" not in part.rows.column_names or len(there) < 2 or not whole:
            raise ConfigError(
                f"{file} should have the columns question, A, B and, for more choices, C, D and E; "
                f"there are {', '.join(part.rows.column_names)}"
            )
        questions, named = [], [f"{file}, row {row}" for row in range(len(part.rows))]
        for row, where in zip(part.rows, named, strict=True):
            choices = [str(row[letter]) for letter in there if row[letter] is not None]
            if row["question"] is None or len(choices) < 2 or row[there[len(choices) - 1]] is None:
                raise ConfigError(
                    f"{where}: the question or one of its choices is missing; give at least A and B, "
                    "and leave no letter out between two choices"
                )
            questions.append(Question(str(row["question"]), choices, 0))
        ids = self._ids(questions, named, str(file))
        counts = [len(question.choices) for question in questions]
        encoded = Dataset.from_dict({"input_ids": ids, "choices": counts})
        return replace(
            self.inputs_of(Part(encoded, str(file)), str(file), ("input_ids", "choices")),
            names=[f"{file}:{row}" for row in range(len(ids))],
            means=[question.choices for question in questions],
        )

    # ------------------------------------------------------------------------------- model
    def build_model(self) -> nn.Module:
        """Return the pretrained model, with an output layer of the letters' rows only."""
        self.refuse_misfit()
        return build_choice_model(self.config.model, self.letters, self.config.run.seed)

    def skeleton(self) -> nn.Module:
        """Return the layers without their weights."""
        rows = range(len(LETTERS))
        return build_choice_model(self.config.model, rows, self.config.run.seed, skeleton=True)

    def example(self) -> Batch:
        """Return a short question with two choices."""
        return {**super().example(), "choices": torch.tensor([2])}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the letters' scores at the answer's position; letters without a choice get -inf."""
        mask = batch["attention_mask"]
        scores = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits
        last = scores[torch.arange(len(mask), device=mask.device), mask.sum(1) - 1]
        beyond = torch.arange(len(LETTERS), device=mask.device) >= batch["choices"][:, None]
        answer: Tensor = last.float().masked_fill(beyond, float("-inf"))
        return answer


def _folder(root: Path, source: Source) -> Path | None:
    """Return a data set's folder inside `root`, named as on the hub with or without the owner."""
    tried = [root / source.hub, root / source.hub.rpartition("/")[2]]
    return next((path for path in tried if path.is_dir()), None)


def _prompt(question: Question) -> str:
    """Return the question as the model reads it, ending with a letter at the answer's position."""
    lettered = zip(LETTERS, question.choices, strict=False)
    lines = [f"Question: {question.text}", *(f"{letter}. {text}" for letter, text in lettered), CUE]
    return "\n".join(lines) + f" {LETTERS[0]}"
