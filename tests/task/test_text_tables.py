"""Tables of text in common forms are read correctly, and errors name what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers

from layerfed.config import ConfigError
from layerfed.task import Task, loading, text
from tests.task import hub
from tests.task.hub import WORDS, refused


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = hub.xlm_roberta(tmp_path_factory.mktemp("xlm-r"))
    return ["model.name=transformers/FacebookAI/xlm-roberta-base", f"model.weights={folder}"]


def rows_task(folder: Path, model: list[str], columns: dict[str, list[object]], *more: str) -> Task:
    """A task on a table of JSON lines: several values in turn, 60 rows."""
    file = folder / "table.jsonl"
    rows = [{name: cells[i % len(cells)] for name, cells in columns.items()} for i in range(60)]
    file.write_text("\n".join(map(json.dumps, rows)))
    few = ["federation.clients=2", "federation.clients-per-round=2", "task.partition=iid"]
    return hub.task("task.name=custom", f"task.data={file}", *few, *model, *more)


@pytest.mark.parametrize(
    "layout", ["table.csv", "table.tsv", "folder/train.csv", "folder/train.tsv"]
)
def test_none_and_na_are_names_in_tables(layout: str, tmp_path: Path, model: list[str]) -> None:
    """Only an empty cell is missing, in a file as in a folder."""
    mark = "\t" if layout.endswith("tsv") else ","
    rows = [("w1 w2", ["None", "b"][i % 2], ["NA", "EU"][i // 2 % 2]) for i in range(48)]
    file = tmp_path / layout
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(mark.join(row) for row in [("text", "label", "region"), *rows]))
    data = file if file.parent == tmp_path else file.parent
    given = ["task.name=custom", f"task.data={data}", "task.partition=by-column"]
    few = ["federation.clients=2", "federation.clients-per-round=2"]
    found = hub.task(*given, "task.group-column=region", *few, *model)
    found.partition(1)
    assert isinstance(found, text.TextTask)
    assert (found.classes, found.groups) == (("None", "b"), ("EU", "NA"))


@pytest.mark.parametrize("layout", ["table.csv", "folder/train.csv"])
def test_commas_outside_quotes_shift_no_column(
    layout: str, tmp_path: Path, model: list[str]
) -> None:
    """Without this check the label's column would hold the beginning of the text."""
    file = tmp_path / layout
    file.parent.mkdir(exist_ok=True)
    file.write_text("label,text\n" + "".join(f"{'ab'[i % 2]},w1, w2\n" for i in range(40)))
    data = file if file.parent == tmp_path else file.parent
    says = [
        str(file),
        "line 2",
        "3 fields, more fields than the header's 2",
        "put text with commas in quotes",
    ]
    refused(lambda: hub.task("task.name=custom", f"task.data={data}", *model), *says)


@pytest.mark.parametrize(
    ("train", "test", "says"),
    [
        (["a", "b"], ["a", "c"], ["split 'test'", "row 1", "label = 'c'", "a, b"]),
        (["b", None, "a"], ["a", "b"], ["split 'train'", "row 1", "label = None", "a"]),
    ],
    ids=["unknown", "null"],
)
def test_labels_that_are_not_known_are_named(
    train: list[str], test: list[str], says: list[str], tmp_path: Path, model: list[str]
) -> None:
    for split, labels in (("train", train), ("test", test)):
        columns = {"text": ["w1 w2"] * len(labels), "label": labels}
        hub.parquet(tmp_path / f"{split}-00000-of-00001.parquet", columns)
    few = ["federation.clients=1", "federation.clients-per-round=1"]
    refused(lambda: hub.task("task.name=custom", f"task.data={tmp_path}", *few, *model), *says)


# ------------------------------------------------------------------ a cell is what the file says
def cells_task(file: Path, model: list[str], *more: str) -> Task:
    few = ["federation.clients=1", "federation.clients-per-round=1", "task.test-share=0.1"]
    return hub.task("task.name=custom", f"task.data={file}", *few, *model, *more)


def read(file: Path) -> dict[str, list[object]]:
    return loading.load_file_list([file]).to_dict()  # type: ignore[no-any-return]


def test_a_quote_in_a_tsv_is_a_character(tmp_path: Path) -> None:
    """It does not open a cell that swallows the rows up to the next one."""
    file = tmp_path / "table.tsv"
    texts = ['"w1', "w2", 'w3 "w4"', '"w5" w6']
    file.write_text("text\tlabel\n" + "".join(f"{t}\ta\n" for t in texts), encoding="utf-8")
    assert read(file) == {"text": texts, "label": ["a"] * 4}


def test_a_csv_keeps_what_stands_in_quotes(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text('\ufefftext,label\r\n"a ""b"", c\nd",1\r\n\r\n007,\r\n', encoding="utf-8")
    assert read(file) == {"text": ['a "b", c\nd', "007"], "label": ["1", None]}


def test_the_index_of_a_table_has_no_name(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text(",text,label\n0,w1,a\n")
    assert read(file) == {"unnamed 0": ["0"], "text": ["w1"], "label": ["a"]}


@pytest.mark.parametrize(
    ("suffix", "content", "says"),
    [
        (".tsv", b"text\tlabel\nw1\ta\nw2\n", ["line 3", "1 fields, fewer", "no quotes"]),
        (".csv", b"text,label\nw1,a\nw2\n", ["line 3", "1 fields, fewer", "in quotes"]),
        (".csv", b'text,label\n"w1,a\nw2,b\n', ["line 3", "unexpected end", "quote"]),
        (".csv", b'text,label\n"w1" w2,a\n', ["line 2", "expected after", "quote"]),
        (".csv", "text,label\nw1,a\ncafé,b\n".encode("latin-1"), ["line 3", "0xe9", "as UTF-8"]),
        (".csv", "text,label\nw1,a\n".encode("utf-16"), ["line 1", "0xff", "as UTF-8"]),
        (".csv", b"text,label,text\nw1,a,w2\n", ["two columns are called 'text'"]),
        (".csv", b"", ["is empty"]),
        (".jsonl", '{"text": "café", "label": "a"}\n'.encode("latin-1"), ["table.jsonl", "utf-8"]),
    ],
)
def test_cells_that_cannot_be_read_are_named(
    suffix: str, content: bytes, says: list[str], tmp_path: Path, model: list[str]
) -> None:
    file = tmp_path / f"table{suffix}"
    file.write_bytes(content)
    refused(lambda: cells_task(file, model), str(file), *says)
    folder = tmp_path / "folder"
    folder.mkdir()
    file.rename(folder / f"train{suffix}")
    told = [text for text in says if text != "table.jsonl"]
    refused(lambda: cells_task(folder, model), str(folder), *told)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_column_that_is_not_used_may_change_its_type(
    suffix: str, tmp_path: Path, model: list[str]
) -> None:
    count = 12_000
    rows = [
        {"text": "w1", "label": "ab"[i % 2], "price": i if i < count - 1 else "on request"}
        for i in range(count)
    ]
    file = tmp_path / f"table.{suffix}"
    if suffix == "csv":
        lines = [",".join(map(str, row.values())) for row in rows]
        file.write_text("\n".join(["text,label,price", *lines]))
    else:
        # As long as the pieces in which the library reads it.
        text = " ".join(["w1"] * 300)
        file.write_text("\n".join(json.dumps(row | {"text": text}) for row in rows))
    assert len(cells_task(file, model).partition(0)) == count * 9 // 10


def test_labels_stay_as_they_are_written(tmp_path: Path, model: list[str]) -> None:
    """An empty cell would turn a column of whole numbers into 1.0, 2.0 …; their order is of numbers."""
    file = tmp_path / "table.csv"
    lines = [f"w{i % 9},{i % 10 + 1},{'' if i == 3 else i}\n" for i in range(40)]
    file.write_text("text,stars,age\n" + "".join(lines))
    found = cells_task(file, model, "task.label-column=stars")
    assert found.classes == tuple(map(str, range(1, 11)))  # type: ignore[attr-defined]
    file.write_text(file.read_text().replace("w5,6,", "w5,,"))
    found = cells_task(file, model, "task.label-column=stars")
    refused(lambda: found, str(file.parent), "row 5", "stars = None", "1, 2, 3")


def test_files_of_one_table_need_the_same_columns(tmp_path: Path) -> None:
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for file, header in zip(files, ("text,label", "label,text"), strict=True):
        file.write_text(f"{header}\nw1,w2\n")
    with pytest.raises(
        ConfigError, match=r"b\.csv has the columns label, text, but .*a\.csv has tex"
    ):
        loading.load_file_list(files)


@pytest.mark.parametrize("name", ["x[12]", "a*b", "what?", "{a,b}", "~x", "a b#c%20"])
@pytest.mark.parametrize("kind", ["file", "json", "folder", "card", "saved"])
def test_a_path_is_no_pattern(name: str, kind: str, tmp_path: Path) -> None:
    """`x[12]` matches its sibling `x1`, whose reviews are of someone else."""
    for folder in (name, "x1", "axb", "whatx"):
        whose = "mine" if folder == name else "theirs"
        place = tmp_path / folder
        place.mkdir()
        (place / "train.csv").write_text(f"text,label\n{whose},a\n")
        (place / "table.jsonl").write_text(json.dumps({"text": whose, "label": "a"}))
        if kind == "card":
            card = "configs: [{config_name: default, data_files: train.csv}]"
            (place / "README.md").write_text(f"---\n{card}\n---\n")
        if kind == "folder":
            (place / "table.jsonl").unlink()
        if kind == "saved":
            loading.load_file_list([place / "train.csv"]).save_to_disk(str(place / "saved"))
    inside = {"file": "train.csv", "json": "table.jsonl", "saved": "saved"}.get(kind, "")
    (rows,) = loading.load_splits(str(tmp_path / name / inside)).values()
    assert rows["text"][:] == ["mine"]


def test_what_is_hidden_is_no_table(tmp_path: Path) -> None:
    for name in ("train.csv", ".ipynb_checkpoints/train-checkpoint.csv", "._train.csv", "b/C.TSV"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert loading.data_files(tmp_path) == [tmp_path / "b/C.TSV", tmp_path / "train.csv"]


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("in the way")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    says = [str(tmp_path / "cache"), "cannot be written", "set HF_DATASETS_CACHE"]
    refused(lambda: rows_task(tmp_path, model, {"text": ["w1"], "label": ["a", "b"]}), *says)


@pytest.mark.parametrize(
    ("columns", "more", "says"),
    [
        ({"text": [1, 2], "label": ["a", "b"]}, [], ["'text' is of type int64, not text"]),
        (
            {"text": [["w1"], ["w2"]], "label": ["a", "b"]},
            [],
            ["'text' is of type List", "input-col"],
        ),
        (
            {"text": ["w1"], "label": [["a"], ["b"]]},
            [],
            ["'label' is of type List", "label-column"],
        ),
        ({"text": ["w1"], "label": [1, "b"]}, [], ["'label' is of type Json", "names or numbers"]),
        (
            {"text": ["w1"], "label": [1, 2], "shop": [["x"], ["y"]]},
            ["task.group-column=shop"],
            ["'shop' is of type List", "task.group-column"],
        ),
    ],
    ids=["numbers", "lists", "listed labels", "mixed labels", "listed groups"],
)
def test_columns_of_other_types_are_named(
    columns: dict[str, list[object]],
    more: list[str],
    says: list[str],
    tmp_path: Path,
    model: list[str],
) -> None:
    refused(lambda: rows_task(tmp_path, model, columns, *more), "table.jsonl", *says)


def test_labels_that_tell_nothing_apart_are_refused(tmp_path: Path, model: list[str]) -> None:
    one = {"text": ["w1"], "label": ["a"]}
    refused(lambda: rows_task(tmp_path, model, one), "classes are a", "at least two")
    two = {"text": ["w1"], "label": ["a", "b"]}
    refused(lambda: rows_task(tmp_path, model, two, "task.classes=b"), "classes are b")


def test_a_column_of_measures_is_not_taken_for_labels(tmp_path: Path, model: list[str]) -> None:
    columns = {"text": ["w1"], "score": [i / 100 for i in range(60)]}
    column = "task.label-column=score"
    says = ["'score' has 60 different values in 60 rows", "is it a label", "task.label-column"]
    refused(lambda: rows_task(tmp_path, model, columns, column), *says)
    rows_task(tmp_path, model, columns, column, "task.classes=all").partition(0)


def test_test_rows_count_whatever_their_group(tmp_path: Path, model: list[str]) -> None:
    for split, shops in (("train", "xy"), ("test", "xz")):
        lines = [f"w1,{'ab'[i % 2]},{shops[i // 2 % 2]}\n" for i in range(40)]
        (tmp_path / f"{split}.csv").write_text("text,label,shop\n" + "".join(lines))
    few = ["federation.clients=2", "federation.clients-per-round=2"]
    given = ["task.partition=by-column", "task.group-column=shop", *few, *model]

    def tested(*groups: str) -> int:
        found = hub.task("task.name=custom", f"task.data={tmp_path}", *given, *groups)
        assert [len(found.partition(i)) for i in range(2)] == [20, 20]
        return len(found.test_examples())

    assert (tested(), tested("task.groups=all"), tested("task.groups=x,y")) == (40, 40, 20)


def test_rows_without_text_are_named(tmp_path: Path, model: list[str]) -> None:
    columns = {"text": ["w1"] * 20 + [" "], "label": ["a", "b", "a"] * 7}
    file = hub.parquet(tmp_path / "table.parquet", columns)
    few = ["federation.clients=1", "federation.clients-per-round=1"]
    refused(
        lambda: hub.task("task.name=custom", f"task.data={file}", *few, *model),
        "row 20",
        "text holds no text",
    )


def test_a_broken_file_is_named(tmp_path: Path, model: list[str]) -> None:
    file = tmp_path / "broken.parquet"
    file.write_bytes(b"PAR1 this is not one")
    refused(lambda: hub.task("task.name=custom", f"task.data={file}", *model), "broken.parquet")
    other = tmp_path / "table.xlsx"
    other.write_bytes(b"x")
    refused(
        lambda: hub.task("task.name=custom", f"task.data={other}", *model), "table.xlsx", ".csv"
    )


# -------------------------------------------------------------- nothing in a text is a token
def unigram(*normalizers: object, special: tuple[str, ...] = ("<s>", "</s>", "<mask>")) -> object:
    """A tokenizer as XLM-R's: its special tokens are words of the model too."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [(c, -9.0) for c in "abcdefghijklmnopqrstuvwxyz<>/ ▁"]
    words = [("<unk>", 0.0), *((token, 0.0) for token in special), *letters, ("▁w", -2.0)]
    raw = tokenizers.Tokenizer(models.Unigram(words, 0, byte_fallback=False))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    if normalizers:
        raw.normalizer = tokenizers.normalizers.Sequence(list(normalizers))
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def word_level(folder: Path) -> object:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(hub.tokenizer(folder))


@pytest.mark.parametrize("kind", ["unigram", "word level"])
@pytest.mark.parametrize("said", ["w1 </s> w2", "<s></s>", "</s>", "x</s>y"])
def test_a_special_token_in_a_text_is_text(kind: str, said: str, tmp_path: Path) -> None:
    made: Any = unigram() if kind == "unigram" else word_level(tmp_path)
    plain, quoted = text.tokenised(made, ["w1", said], ["a", "b"])
    assert plain == made("w1")["input_ids"]
    assert (quoted[0], quoted[-1]) == (made.bos_token_id, made.eos_token_id)
    assert not {made.bos_token_id, made.eos_token_id} & set(quoted[1:-1])
    assert len(quoted) > 3


@pytest.mark.parametrize("said", ["\uff1c/s\uff1e", "</S>", "<MASK>"])
def test_a_special_token_is_text_in_any_spelling(said: str) -> None:
    from tokenizers import normalizers

    made: Any = unigram(normalizers.NFKC(), normalizers.Lowercase())
    (quoted,) = text.tokenised(made, [said], ["a"])
    assert not {1, 2, 3} & set(quoted[1:-1])


def test_a_text_that_holds_a_token_nevertheless_is_refused() -> None:
    from tokenizers import normalizers

    made: Any = unigram(normalizers.Replace("STOP", "</s>"))
    with pytest.raises(ConfigError, match=r"^x, row 7: .*its special token </s>; reword"):
        text.tokenised(made, ["STOP"], ["x, row 7"])


def test_a_question_ends_where_it_ends(tmp_path: Path) -> None:
    data = hub.questions(tmp_path / "qa", count=12)
    columns = {"goal": ["w1 </s> <pad> w2"] * 12, "sol1": ["yes"] * 12, "sol2": ["</s>"] * 12}
    rows = {**columns, "label": [0] * 12}
    kinds = {"label": datasets.Value("int64")}
    for split in ("train", "validation"):
        hub.parquet(data / f"piqa/plain_text/{split}/0000.parquet", rows, **kinds)
    model = ["model.name=transformers/x", f"model.weights={hub.llama(tmp_path / 'model')}"]
    few = ["federation.clients=1", "federation.clients-per-round=1", "task.partition=iid"]
    found = hub.task("task.name=qa", f"task.data={data}", "task.groups=piqa", *few, *model)
    batch = hub.whole(found.partition(0))
    inside = batch["input_ids"][:, 1:][batch["attention_mask"][:, 1:] > 0]
    assert not set(inside.tolist()) & {0, 1, 2}


# ----------------------------------------------------------------- what a model can read
def test_a_decoder_scores_each_text_at_its_last_token(tmp_path: Path) -> None:
    """Its tokenizer has no token for padding, and pads with the token that ends every text."""
    columns: dict[str, list[object]] = {
        "text": [" ".join(WORDS[:i]) for i in range(1, 12)],
        "label": ["a", "b"],
    }
    found = rows_task(tmp_path, limited("gpt2", tmp_path), columns)
    net = found.build_model().eval()
    part = found.partition(1)
    batch = part.store.batch(part.indices[:6])
    ends = batch["attention_mask"].sum(1)
    assert isinstance(found, text.TextTask)
    assert found.pad == found.tokenizer.eos_token_id
    assert len(set(ends.tolist())) > 1
    net.config.pad_token_id = 59  # which no text has
    with torch.no_grad():
        together = found.logits(net, batch)
        for row, (ids, end) in enumerate(zip(batch["input_ids"], ends.tolist(), strict=True)):
            assert ids[end - 1] == found.pad
            alone = net(input_ids=ids[None, :end]).logits
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def limited(kind: str, folder: Path, **changes: object) -> list[str]:
    weights = {"roberta": hub.xlm_roberta, "gpt2": hub.gpt2, "llama": hub.llama}[kind](
        folder / "weights", **changes
    )
    return ["model.name=transformers/x", f"model.weights={weights}"]


@pytest.mark.parametrize(
    ("kind", "changes", "most"),
    [
        ("gpt2", {"n_positions": 60}, 56),
        # Two positions are the padding's and what stands before it.
        ("roberta", {"max_position_embeddings": 66}, 64),
        ("roberta", {"max_position_embeddings": 65}, 56),
        ("llama", {"max_position_embeddings": 64}, 64),
    ],
)
def test_texts_longer_than_the_model_reads_are_refused(
    kind: str, changes: dict[str, object], most: int, tmp_path: Path
) -> None:
    columns: dict[str, list[object]] = {"text": [" ".join(WORDS * 3)], "label": ["a", "b"]}
    model = limited(kind, tmp_path, **changes)
    found = rows_task(tmp_path, model, columns, f"task.max-tokens={most}")
    part = found.partition(0)
    assert found.logits(found.build_model(), part.store.batch(part.indices[:2])).shape == (2, 2)
    too_long = rows_task(tmp_path, model, columns, f"task.max-tokens={most + 1}")
    with pytest.raises(ConfigError, match=rf"max-tokens = {most + 1}, but .* lower it to {most}$"):
        too_long.build_model()


def test_a_network_that_reads_texts_from_the_left_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 60, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16}
    transformers.XLNetConfig(**sizes).save_pretrained(tmp_path / "xlnet")
    hub.tokenizer(tmp_path / "xlnet")
    model = [f"model.name=transformers/{tmp_path / 'xlnet'}", "model.weights=random"]
    found = rows_task(tmp_path, model, {"text": ["w1"], "label": ["a", "b"]})
    with pytest.raises(
        ConfigError, match=r"^model\.name names a network of type xlnet, .* another"
    ):
        found.build_model()


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(kind: str, tmp_path: Path) -> None:
    columns: dict[str, list[object]] = {"text": ["w1"], "label": ["a", "b"]}
    found = rows_task(tmp_path, limited(kind, tmp_path, vocab_size=40), columns)
    with pytest.raises(ConfigError, match=r"ids up to \d+, but .* knows 40 .*model\.tokenizer"):
        found.build_model()


@pytest.mark.parametrize(
    ("files", "unread"),
    [
        (["a.csv", "b.csv", "c.jsonl"], "c.jsonl"),
        (["train.csv", "test.csv", "extra.csv"], "extra.csv"),
    ],
)
def test_no_table_of_a_folder_is_left_out_unsaid(
    files: list[str], unread: str, tmp_path: Path
) -> None:
    for name in files:
        row = '{"text": "x", "label": "a"}' if name.endswith("jsonl") else "text,label\nx,a"
        (tmp_path / name).write_text(f"{row}\n")
    (tmp_path / "README.md").write_text("What I know of these files.")
    (tmp_path / "dataset_infos.json").write_text("{}")
    with pytest.raises(ConfigError, match=rf"{unread} would not be read beside"):
        loading.load_splits(str(tmp_path))
    (tmp_path / unread).unlink()
    assert sum(map(len, loading.load_splits(str(tmp_path)).values())) == 2
