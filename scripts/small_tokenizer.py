"""Train a small tokenizer for a small language model that comes without one.

    python scripts/small_tokenizer.py path/to/qa path/to/tokenizer

It is a byte-level BPE of 512 tokens, trained on the questions of the data sets that `task.name=qa`
reads. A model that was trained with another tokenizer does not know these tokens. So this one is good
for trying the task, but not for scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

COLUMNS = ("question", "question_stem", "goal", "sol1", "sol2", "correct_answer", "distractor1")
START, END = "<s>", "</s>"


def texts(data: Path) -> Iterator[str]:
    """Yield the questions and some of the answers in a folder's parquet files."""
    for file in sorted(data.rglob("*.parquet")):
        table = pq.read_table(file)
        for column in set(COLUMNS) & set(table.column_names):
            yield from (str(text) for text in table[column].to_pylist())


def main(
    data: Annotated[Path, typer.Argument(help="folder with the data sets' parquet files")],
    folder: Annotated[Path, typer.Argument(help="where to write the tokenizer")],
    size: Annotated[int, typer.Option(help="tokens; as many as the model's embeddings")] = 512,
) -> None:
    """Train a tokenizer and write it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(data), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=END
    )
    fast.save_pretrained(folder)
    print(f"{len(fast)} tokens in {folder}")


if __name__ == "__main__":
    typer.run(main)
