"""Instructions: a language model learns to answer the prompts of a table.

A row has a prompt, in one or more columns, and an answer. Both are written as a conversation by the
tokenizer's chat template. The loss is that of the answer's tokens, with the one that ends it. The data
sets of FlowerTune's four challenges (`vicgalle/alpaca-gpt4`, `FinGPT/fingpt-sentiment-train`,
`medalpaca/medical_meadow_medical_flashcards`, `lucasmccabe-lmi/CodeAlpaca-20k`) have the columns
instruction, input and output, which are found by themselves.

Training packs the examples of a batch into rows of `task.max-tokens`. Positions begin at 0 with each
example, and from that transformers makes a mask in which no example sees another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from logging import INFO
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Value
from flwr.common.logger import log
from torch import Tensor, nn

from layerfed.config import ConfigError, RunConfig
from layerfed.config.section import words
from layerfed.exchange.scores import Score
from layerfed.models.source import require
from layerfed.models.text import build_language_model, reading_limits, tokenizer_key
from layerfed.task.base import Batch, Examples
from layerfed.task.dataset_task import Columns, Encoder, Table
from layerfed.task.loading import Part, pick_columns
from layerfed.task.names import names_in
from layerfed.task.scoring import IGNORED, CausalLM, Generation
from layerfed.task.text import TextTask, filled, plain_text, token_features, tokens_with_meaning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The chat template of a tokenizer that has none, such as that of most base models.
PLAIN = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ message.content }}{{ eos_token }}{% else %}"
    "### Instruction:\n{{ message.content }}\n\n### Response:\n{% endif %}{% endfor %}"
)
# The number of scored positions is rounded up to a multiple of this, so that there are few shapes.
SCORED = 32
# How far the scores of a text in a packed row may be from those of the text alone.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 3e-2}


class Answering(Generation):
    """The next token of answers, and generated answers; the perplexity is the main score."""

    scores = (*CausalLM.scores, Score("exact_match"))


class Decoded(Table):
    """A store that says of each example whether its answer is generated, as `decoded`."""

    def __init__(self, table: Table, chosen: np.ndarray) -> None:
        super().__init__(table.rows, table.collate)
        self._chosen = chosen

    def batch(self, indices: np.ndarray) -> Batch:
        """Return some rows as a batch."""
        decoded = torch.from_numpy(np.isin(indices, self._chosen))
        return {**super().batch(indices), "decoded": decoded}


class Instructions(TextTask):
    """Prompts and answers, for a causal language model of `transformers`.

    A batch has the `input_ids` of prompts with their answers, the positions that predict a token of an
    answer as `scored`, shape (R, S), and these tokens as `label`. Rows are padded on the right and have
    an `attention_mask`; packed rows have `position_ids` instead.
    """

    kind = Answering
    settings: ClassVar[frozenset[str]] = (
        TextTask.settings | {"packing", "decode_examples", "new_tokens"}
    ) - {"classes"}
    inputs: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("instruction", "input", "output"),
        ("instruction", "context", "response"),
        ("instruction", "output"),
        ("instruction", "response"),
        ("prompt", "completion"),
        ("prompt", "response"),
        ("prompt", "answer"),
        ("question", "answer"),
    )
    """The last column of each has the answers."""
    classes = ()

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._packed: dict[int, Table] = {}
        section = config.task
        if section.partition == "dirichlet" and not section.label_column:
            raise ConfigError(
                "task.partition = 'dirichlet' spreads categories, and instructions have none of "
                "themselves; name a column of categories by task.label-column, or use iid or by-column"
            )
        if section.metric == "exact_match" and not section.decode_examples:
            raise ConfigError(
                "task.metric = 'exact_match' needs generated answers; raise task.decode-examples = 0"
            )

    # -------------------------------------------------------------------------------- the data
    @cached_property
    def _known_classes(self) -> tuple[str, ...]:
        """The categories, which only `task.partition = "dirichlet"` uses."""
        parts = [*self.parts[0], *self.parts[1]]
        return names_in([(p, column) for p in parts if (column := self._label_column(p))])

    def _label_column(self, part: Part) -> str:
        if self.own_data or not self.config.task.label_column:
            return ""
        return super()._label_column(part)

    @cached_property
    def _answer_columns(self) -> frozenset[str]:
        given = words(self.config.task.input_columns)
        return frozenset(given[-1:] or (columns[-1] for columns in self.inputs))

    def input_columns(self, part: Part) -> tuple[str, ...]:
        """Return the columns of the prompt, and that of the answer, which is the last."""
        columns = super().input_columns(part)
        if len(columns) < 2:
            raise ConfigError(
                f"task.input-columns = '{columns[0]}': name the columns of the prompt, and then that of "
                "the answer"
            )
        return columns

    def columns_to_predict(self, part: Part) -> tuple[str, ...]:
        """Return the columns of the prompt."""
        given = words(self.config.task.input_columns)[:-1]
        prompts = [columns[:-1] for columns in self.inputs]
        columns = pick_columns(",".join(given), prompts, part, "task.input-columns")
        return self.of_text(part, columns)

    def is_complete(self, cells: Mapping[str, Any]) -> bool:
        """Return whether a row has a prompt and an answer."""
        *prompt, answer = ((cell or "").strip() for cell in cells.values())
        return any(prompt) and bool(answer)

    def encode(self, part: Part) -> Dataset:
        """Encode a part's rows, once a machine, and say how many are left out or cut."""
        rows = super().encode(part)
        left_out = len(part.rows) - len(rows)
        cut = int(np.sum(rows.with_format("arrow").data.column("cut").to_numpy()))
        if left_out or cut:
            log(
                INFO,
                "%s: of %d rows %d are left out (no prompt, no answer, or a group that was not chosen), "
                "and %d are cut (task.max-tokens = %d)",
                *(part.where, len(part.rows), left_out, cut, self.config.task.max_tokens),
            )
        return rows

    # ------------------------------------------------------------------------------ the tokens
    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, or the one that `model.tokenizer` names, with a chat template."""
        found = super().tokenizer
        found.chat_template = found.chat_template or PLAIN
        return found

    @cached_property
    def stops(self) -> list[int]:
        """The tokens that end an answer: the tokenizer's own, and what its chat template puts there."""
        _, answer = self._written("x", "x")
        special = tokens_with_meaning(self.tokenizer)
        ends = {token for token in self._tokens([answer])[0] if token in special}
        return sorted(ends | ({self.tokenizer.eos_token_id} - {None}))

    def _written(self, prompt: str, answer: str | None) -> tuple[str, str]:
        """Return a prompt and an answer as the chat template writes them, one after the other.

        Raises
        ------
        ConfigError
            If it writes the prompt in another way when there is an answer.
        """
        asked = [{"role": "user", "content": prompt}]
        chat: Callable[..., Any] = self.tokenizer.apply_chat_template
        before: str = chat(asked, tokenize=False, add_generation_prompt=True)
        if answer is None:
            return before, ""
        replied = [*asked, {"role": "assistant", "content": answer}]
        # What follows the end, such as a line break, is never generated.
        whole: str = chat(replied, tokenize=False).rstrip()
        if not whole.startswith(before):
            raise ConfigError(
                f"the chat template of model.name = '{self.config.model.name}' does not put an answer "
                "right after what it writes for a prompt; choose another model.tokenizer"
            )
        return before, whole[len(before) :]

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return ids

    def _fitted(self, prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        """Cut the beginning of a prompt and the end of an answer; each keeps half of a row if needed."""
        room = self.config.task.max_tokens
        left = max(room - len(answer), min(len(prompt), room // 2))
        if len(prompt) > left:
            first = prompt[:1] * (prompt[0] == self.tokenizer.bos_token_id)
            prompt = [*first, *prompt[len(prompt) - left + len(first) :]]
        return prompt, answer[: room - len(prompt)]

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder that writes prompts, joined by blank lines, and answers by the chat template."""
        plain, answers = plain_text(self.tokenizer), self._answer_columns

        def encode(columns: Columns, rows: Sequence[int], where: str) -> Columns:
            # The only column is a prompt, whatever it is called: that of a `.txt` file.
            alone = len(columns) == 1
            asking = [cells for name, cells in columns.items() if alone or name not in answers]
            replies = next(
                (cells for n, cells in columns.items() if n in answers and not alone),
                [None] * len(rows),
            )
            texts = []
            for row, reply, *cells in zip(rows, replies, *asking, strict=True):
                prompt = "\n\n".join(cell for cell in cells if cell and cell.strip())
                if not prompt:
                    raise ConfigError(
                        f"{where}, row {row}: {' + '.join(columns)} holds no text; leave the row out"
                    )
                texts.append(self._written(plain(prompt), None if reply is None else plain(reply)))
            made: Columns = {"input_ids": [], "prompt": [], "cut": []}
            if not texts:
                return made
            for pair in zip(*(self._tokens(t) for t in zip(*texts, strict=True)), strict=True):
                prompt_ids, answer_ids = self._fitted(*pair)
                made["input_ids"].append(prompt_ids + answer_ids)
                made["prompt"].append(len(prompt_ids))
                made["cut"].append(len(prompt_ids) + len(answer_ids) < sum(map(len, pair)))
            return made

        key = (
            "instructions",
            self.config.task.max_tokens,
            tokenizer_key(self.tokenizer),
            self._written("a", "b"),
            sorted(answers),
        )
        features = {**token_features(), "prompt": Value("int64"), "cut": Value("bool")}
        return Encoder(key, features, encode, lambda rows: collated(rows, self.pad))

    # ---------------------------------------------------------------------- clients, test set
    @property
    def packs(self) -> bool:
        """Whether rows are packed; the prefix of a packed row, which changes, could not be kept."""
        return self.config.task.packing and not self.config.train.prefix_cache

    def client_examples(self, partition_id: int) -> tuple[Examples, Examples]:
        """Return one client's training examples, in packed batches, and its held-out share."""
        train, held_out = super().client_examples(partition_id)
        if self.packs:
            room, rows = filled(self.config.task.max_tokens), _table(train).rows
            made = Table(rows, lambda rows: collated(rows, self.pad, room))
            train = replace(train, store=self._packed.setdefault(id(rows), made))
        return train, self._decoded(held_out)

    def test_examples(self) -> Examples:
        """Return the server's test set, ordered by the length of texts."""
        return self._decoded(super().test_examples())

    def _decoded(self, examples: Examples) -> Examples:
        """Mark those of which answers are generated, which are the same for every run."""
        drawn = np.random.default_rng(0).permutation(np.sort(examples.indices))
        chosen = drawn[: self.config.task.decode_examples]
        return replace(examples, store=Decoded(_table(examples), chosen))

    # ------------------------------------------------------------------------------- the model
    def build_model(self) -> nn.Module:
        """Return the pretrained model, which generates greedily up to the end of an answer."""
        self.refuse_misfit()
        section, task = self.config.model, self.config.task
        net: Any = build_language_model(section, self.config.run.seed)
        net.eval()
        limit = reading_limits(net, self.pad)[1]
        if limit is not None and (most := task.max_tokens + task.new_tokens) > limit:
            raise ConfigError(
                f"task.max-tokens + task.new-tokens = {most}, but model.name = '{section.name}' reads "
                f"{limit} tokens at most; lower one of them"
            )
        net.generation_config = require("transformers", section.name).GenerationConfig(
            do_sample=False,
            max_new_tokens=task.new_tokens,
            eos_token_id=self.stops or None,
            pad_token_id=self.pad,
        )
        if self.packs and not self._keeps_apart(net):
            raise ConfigError(
                f"task.packing = true: model.name = '{section.name}' lets the examples in a row see "
                "each other; set task.packing=false"
            )
        found: nn.Module = net
        return found

    @torch.no_grad()
    def _keeps_apart(self, net: Any) -> bool:
        """Return whether a text in a packed row has the scores that it has alone."""
        ids = self.example()["input_ids"]
        row, places = torch.cat([ids.flip(1), ids], 1), torch.arange(ids.shape[1]).repeat(1, 2)
        alone = net(input_ids=ids, use_cache=False).logits
        try:
            packed = net(input_ids=row, position_ids=places, use_cache=False).logits
        except TypeError:
            return False  # it has no positions
        far = (packed[:, ids.shape[1] :] - alone).abs().max()
        return bool(far <= TOLERANCE[alone.dtype] * alone.abs().max())

    def skeleton(self) -> nn.Module:
        """Return the layers without their weights."""
        return build_language_model(self.config.model, self.config.run.seed, skeleton=True)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the scores of the next token at the scored positions, or at all of them."""
        net: Any = model
        ids = batch["input_ids"]
        how = {name: batch[name] for name in ("attention_mask", "position_ids") if name in batch}
        if ids.is_meta and "position_ids" in how:
            # Positions without values make no mask, and a packed row's takes memory.
            shape = ids.shape[0], 1, ids.shape[1], ids.shape[1]
            how["attention_mask"] = torch.ones(shape, dtype=torch.bool, device="meta")

        def only_scored(_module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
            return (given[0].take_along_dim(batch["scored"][..., None], 1),)

        with ExitStack() as hooks:
            if "scored" in batch:
                # In front of the output layer, since what models do behind it differs.
                output = net.get_output_embeddings()
                hooks.callback(output.register_forward_pre_hook(only_scored).remove)
            scores: Tensor = net(input_ids=ids, use_cache=False, **how).logits
        return scores

    def largest_batch(self, size: int) -> Batch | None:
        """Return a batch in which every example fills a row."""
        width = filled(self.config.task.max_tokens)
        widths = {"input_ids": width, "position_ids" if self.packs else "attention_mask": width}
        widths |= dict.fromkeys(("scored", "label"), filled(width, SCORED))
        return {n: torch.empty(size, w, dtype=torch.long, device="meta") for n, w in widths.items()}

    def answers(self, model: nn.Module, batch: Batch) -> tuple[Sequence[object], Sequence[object]]:
        """Return the greedy answers and the right ones as texts, of the rows that are `decoded`."""
        net: Any = model
        ids, chosen = batch["input_ids"], batch.get("decoded", batch["prompt"] > 0)
        if not chosen.any():
            return [], []
        lengths = batch["prompt"][chosen]
        width = int(lengths.max())
        # Padded on the left, since the answer follows the last place.
        places = torch.arange(width, device=ids.device) - (width - lengths)[:, None]
        prompts = ids[chosen].take_along_dim(places.clamp(min=0), 1)
        mask = places >= 0
        made = net.generate(
            input_ids=prompts.masked_fill(~mask, self.pad), attention_mask=mask.long()
        )[:, width:]
        # What follows the end is padding, which may be any token.
        ended = torch.isin(made, torch.tensor(self.stops, device=ids.device)).cumsum(1) > 0
        right = batch["label"][chosen]
        pairs = ((made, ~ended), (right, right != IGNORED))
        found, wanted = ([self._text(r[k]) for r, k in zip(*pair, strict=True)] for pair in pairs)
        return found, wanted

    def _text(self, tokens: Tensor) -> str:
        return str(self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)).strip()

    # ------------------------------------------------------------------------- what is written
    def preprocessing(self) -> dict[str, Any]:
        """Return how a prompt becomes the model's input; its tokenizer lies in `tokenizer/`."""
        return {
            **super().preprocessing(),
            "input": "prompt",
            "joined_by": "\n\n",
            "chat_template": self.tokenizer.chat_template,
            "new_tokens": self.config.task.new_tokens,
            "stop_tokens": self.stops,
        }

    def summary(self) -> str:
        """Return the tokenizer, the template and the length that were chosen."""
        plain = self.tokenizer.chat_template == PLAIN
        template = "the plain template, since it has none" if plain else "its chat template"
        packed = ", in packed rows" * self.packs
        return f"{super().summary()}, written by {template}{packed}"


def collated(rows: pa.Table, pad: int, room: int = 0) -> dict[str, Tensor]:
    """Return a batch of encoded rows, each in a row of its own or, with `room`, packed.

    Parameters
    ----------
    rows : pyarrow.Table
        `input_ids`, and `prompt`, the number of tokens before the answer.
    pad : int
        The token that fills rows.
    room : int
        The most tokens of a packed row; 0 does not pack.

    Returns
    -------
    dict[str, Tensor]
        `input_ids` (R, T); `scored`, the positions before each token of an answer, and `label`, these
        tokens, (R, S); and `attention_mask` (R, T) with `prompt` (R,), or for packed rows `position_ids`
        (R, T), which are 0 where nothing is.
    """
    ids = [np.array(row) for row in rows.column("input_ids").to_pylist()]
    starts = rows.column("prompt").to_pylist()
    packs = shared_rows([len(row) for row in ids], room) if room else [[i] for i in range(len(ids))]
    width = max(sum(len(ids[i]) for i in pack) for pack in packs)
    width = room if len(packs) > 1 and room else filled(width)
    most = max(sum(len(ids[i]) - starts[i] for i in pack) for pack in packs)
    shape, answers = (len(packs), width), (len(packs), filled(max(1, most), SCORED))
    tokens, places, mask = np.full(shape, pad), np.zeros(shape, int), np.zeros(shape, int)
    scored, label = np.zeros(answers, int), np.full(answers, IGNORED)
    for row, pack in enumerate(packs):
        at = count = 0
        for example, start in ((ids[i], starts[i]) for i in pack):
            end, after = at + len(example), count + len(example) - start
            tokens[row, at:end], places[row, at:end] = example, np.arange(len(example))
            mask[row, at:end] = 1
            scored[row, count:after] = np.arange(at + start, end) - 1
            label[row, count:after] = example[start:]
            at, count = end, after
    made = {"input_ids": tokens, "scored": scored, "label": label}
    more = (
        {"position_ids": places} if room else {"attention_mask": mask, "prompt": np.array(starts)}
    )
    return {name: torch.from_numpy(array) for name, array in (made | more).items()}


def shared_rows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Return which examples share a row: each goes into the first with room, the longest first."""
    rows: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(left) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(room)
        rows[row].append(i)
        left[row] -= lengths[i]
    return rows


def _table(examples: Examples) -> Table:
    assert isinstance(examples.store, Table)
    return examples.store
