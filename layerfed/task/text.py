"""Tasks on text, which is tokenised once and padded to the longest text of a batch."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, List, Value
from torch import Tensor, nn

from layerfed.config import ConfigError
from layerfed.models.text import (
    build_text_classifier,
    load_tokenizer,
    reading_limits,
    tokenizer_key,
)
from layerfed.task.base import Batch, Examples, Inputs
from layerfed.task.dataset_task import Columns, DatasetTask, Encoder, Table
from layerfed.task.loading import Part, is_text, load_file_list, require_type

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextTask", "by_length", "filled", "padded", "plain_text", "token_features", "tokenised"]

# Lengths are rounded up to a multiple of this, which suits matrix units and makes fewer shapes: FLOPs
# are counted once a shape (`client/flops.py`).
MULTIPLE = 8


class TextTask(DatasetTask):
    """Text classification with a sequence classifier of `transformers`."""

    settings: ClassVar[frozenset[str]] = DatasetTask.settings | {"max_tokens"}
    reads: ClassVar[str] = "text"
    inputs: ClassVar[tuple[tuple[str, ...], ...]] = (("text",),)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, or the one that `model.tokenizer` names."""
        return load_tokenizer(self.config.model)

    @property
    def pad(self) -> int:
        """The token id that fills rows; tokenizers of decoders often have none for it."""
        found = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return next((token for token in found if token is not None), 0)

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder that joins the input columns by a line break, tokenises, and cuts the result."""
        tokenizer, limit = self.tokenizer, self.config.task.max_tokens

        def encode(columns: Columns, rows: Sequence[int], where: str) -> Columns:
            texts = [
                "\n".join(filter(None, cells)) for cells in zip(*columns.values(), strict=True)
            ]
            for text, row in zip(texts, rows, strict=True):
                if not text.strip():
                    raise ConfigError(
                        f"{where}, row {row}: {' + '.join(columns)} holds no text; leave the row out"
                    )
            if not texts:
                return {"input_ids": []}
            named = [f"{where}, row {row}" for row in rows]
            return {
                "input_ids": tokenised(tokenizer, texts, named, truncation=True, max_length=limit)
            }

        pad = self.pad
        key = "text", limit, tokenizer_key(tokenizer)
        return Encoder(key, token_features(), encode, lambda rows: padded(rows, pad))

    def input_columns(self, part: Part) -> tuple[str, ...]:
        """Return the columns of text."""
        return self.of_text(part, super().input_columns(part))

    def of_text(self, part: Part, columns: tuple[str, ...]) -> tuple[str, ...]:
        """Return the columns; refuse one that is not of text."""
        for column in columns:
            require_type(part, column, is_text(part, column), "text", "task.input-columns")
        return columns

    def build_model(self) -> nn.Module:
        """Return the pretrained encoder with a new classification head."""
        self.refuse_misfit()
        return build_text_classifier(
            self.config.model, len(self.classes), self.config.run.seed, pad_token=self.pad
        )

    def refuse_misfit(self) -> None:
        """Refuse token ids or lengths for which the model has no weights, before weights are loaded.

        Raises
        ------
        ConfigError
            If a token id or a length is too large.
        """
        name, asked = self.config.model.name, self.config.task.max_tokens
        known, limit = reading_limits(self.skeleton(), self.pad)
        largest = max(self.pad, *self.tokenizer.get_vocab().values())
        if largest >= known:
            raise ConfigError(
                f"the tokenizer has token ids up to {largest}, but model.name = '{name}' knows {known} "
                "tokens; set model.tokenizer to the model's own tokenizer"
            )
        if limit is not None and filled(asked) > limit:
            raise ConfigError(
                f"task.max-tokens = {asked}, but model.name = '{name}' reads {limit} tokens at most, in "
                f"rows of multiples of {MULTIPLE}; lower it to {limit // MULTIPLE * MULTIPLE}"
            )

    def skeleton(self) -> nn.Module:
        """Return the layers without their weights."""
        return build_text_classifier(
            self.config.model, len(self.classes), self.config.run.seed, skeleton=True
        )

    def preprocessing(self) -> dict[str, Any]:
        """Return how a text becomes the model's input; its tokenizer lies in `tokenizer/`."""
        return {
            "input": "text",
            "columns": self.config.task.input_columns or [list(names) for names in self.inputs],
            "joined_by": "\n",
            "max_tokens": self.config.task.max_tokens,
            "pad_token": self.pad,
            "tokenizer": "tokenizer",
        }

    def keep(self, folder: Path) -> None:
        """Write `classes.json` and the tokenizer."""
        super().keep(folder)
        self.tokenizer.save_pretrained(folder / "tokenizer")

    def recall(self, folder: Path) -> None:
        """Take the classes and the tokenizer from a run folder."""
        super().recall(folder)
        own = self.config.model.model_copy(update={"tokenizer": str(folder / "tokenizer")})
        self.tokenizer = load_tokenizer(own)

    def read(self, file: Path) -> Inputs:
        """Return the texts of a table, or a `.txt` file as one text."""
        if file.suffix.lower() == ".txt":
            try:
                text = file.read_text(encoding="utf-8")
            except ValueError as error:
                raise ConfigError(f"{file} is not UTF-8: {error}; convert it") from None
            rows = Dataset.from_dict({"text": [text]})
            return self.inputs_of(Part(rows, str(file)), str(file), ("text",))
        return self.inputs_of(Part(load_file_list([file]), str(file)), str(file))

    def summary(self) -> str:
        """Return the tokenizer and the length that were chosen."""
        source = self.config.model.tokenizer or self.tokenizer.name_or_path
        # A model card has it too, where a path would tell about the machine.
        named = self.config.model.name if os.path.isabs(source) else source
        return f"texts: {self.config.task.max_tokens} tokens at most, by the tokenizer of {named}"

    def test_examples(self) -> Examples:
        """Return the server's test set, ordered by the length of texts."""
        return by_length(super().test_examples())

    def example(self) -> Batch:
        """Return a short text."""
        ids = self.tokenizer("1 2 3")["input_ids"] or [self.pad]
        row = torch.tensor([ids])
        return {"input_ids": row, "attention_mask": torch.ones_like(row)}

    def largest_batch(self, size: int) -> Batch | None:
        """Return a batch of texts that are cut at `task.max-tokens`."""
        batch = dict(super().largest_batch(size) or {})
        shape = size, filled(self.config.task.max_tokens)
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.empty(shape, dtype=torch.long, device="meta")
        return batch

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return class scores; a decoder's are those at the last token of each text."""
        net: Any = model
        ids, mask = batch["input_ids"], batch["attention_mask"]
        scores: Tensor
        if not hasattr(net, "score"):
            scores = net(input_ids=ids, attention_mask=mask).logits
            return scores
        # This is a decoder. `transformers` would find the last token that is not padding by the padding
        # id, which may also be the id of the token that ends every text.
        hidden = net.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        last = hidden[torch.arange(len(mask), device=mask.device), mask.sum(1) - 1]
        scores = net.score(last)
        return scores


def tokenised(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], named: Sequence[str], **how: Any
) -> list[list[int]]:
    """Return the token ids of texts in which nothing acts as a special token.

    A review that quotes `</s>` or `[SEP]` would otherwise end, or be two. A space after the first
    character prevents it. The tokenizers' own `split_special_tokens` does not: a unigram model, such as
    XLM-R's, has these tokens among its words.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    texts : Sequence[str]
    named : Sequence[str]
        The place of each text, for messages.
    how
        Options of the tokenizer.

    Raises
    ------
    ConfigError
        If a text holds a special token nevertheless.
    """
    ids: list[list[int]] = tokenizer(list(texts), **how)["input_ids"]
    special = tokens_with_meaning(tokenizer)
    plain = plain_text(tokenizer)

    def acting(row: Sequence[int]) -> Counter[str]:
        return Counter(special[token] for token in row if token in special)

    around = acting(tokenizer("", **how)["input_ids"])
    for i, row in enumerate(ids):
        if not acting(row) - around:
            continue
        # A tokenizer may take a fullwidth letter for the plain one.
        ids[i] = tokenizer(plain(unicodedata.normalize("NFKC", texts[i])), **how)["input_ids"]
        if left := acting(ids[i]) - around:
            raise ConfigError(
                f"{named[i]}: the tokenizer reads a part of the text as its special token "
                f"{next(iter(left))}; reword the text, or choose another model.tokenizer"
            )
    return ids


def plain_text(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """Return a function that writes a space into each special token that a text spells out."""
    words = sorted(tokens_with_meaning(tokenizer).values(), key=len, reverse=True)
    if not words:
        return lambda text: text
    spelled = re.compile("|".join(map(re.escape, words)), re.IGNORECASE)
    return lambda text: spelled.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


def tokens_with_meaning(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the tokens with a meaning of their own; an unknown word is rightly read as unknown."""
    found = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found |= {number: token.content for number, token in added.items() if token.special}
    found.pop(tokenizer.unk_token_id, None)
    return found


def token_features() -> dict[str, object]:
    """Return the features of tokenised rows."""
    return {"input_ids": List(Value("int32"))}


def padded(rows: pa.Table, pad: int) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask`, shape (B, T), padded on the right.

    T is the longest row's length, rounded up to a multiple of 8.
    """
    ids = rows.column("input_ids").combine_chunks()
    lengths = np.diff(ids.offsets.to_numpy())
    width = filled(int(lengths.max()))
    mask = np.arange(width) < lengths[:, None]
    tokens = np.full(mask.shape, pad, dtype=np.int64)
    tokens[mask] = ids.flatten().to_numpy()
    return {
        "input_ids": torch.from_numpy(tokens),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
    }


def filled(length: int, multiple: int = MULTIPLE) -> int:
    """Return a length, rounded up to a multiple."""
    return -(-length // multiple) * multiple


def by_length(examples: Examples) -> Examples:
    """Return the examples ordered by length, so that a batch needs little padding."""
    store = examples.store
    assert isinstance(store, Table)
    ids = store.rows.with_format("arrow").data.column("input_ids")
    lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in ids.chunks])
    return examples.select(np.argsort(lengths[examples.indices], kind="stable"))
