"""Texts by language: tokenised once, padded as little as can be, and refused where they are wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel

from layerfed.config import ConfigError
from layerfed.task import Task, text
from tests.task import hub
from tests.task.hub import WORDS, whole

LABELS = ClassLabel(names=["finance", "news", "sports"])
LANGUAGES = ("de", "en", "ru")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = hub.xlm_roberta(tmp_path_factory.mktemp("xlm-r"))
    return ["model.name=transformers/FacebookAI/xlm-roberta-base", f"model.weights={folder}"]


@pytest.fixture(scope="module")
def xglue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """XGLUE's own layout: subset nc, splits by language; English only to train on."""
    folder = tmp_path_factory.mktemp("xglue")
    for number, split in enumerate(
        ("train", *(f"{s}.{x}" for s in ("validation", "test") for x in LANGUAGES))
    ):
        made = hub.news(WORDS[number : number + 5], 30, 3)
        columns = {
            "news_title": [f"{WORDS[number]}"] * 30,
            "news_body": made["text"],
            "news_category": made["label"],
        }
        file = folder / f"nc/{split}-00000-of-00001.parquet"
        hub.parquet(file, columns, news_category=LABELS)
    return folder


def news_task(data: Path, model: list[str], *more: str) -> Task:
    clients = ["federation.clients=3", "federation.clients-per-round=3"]
    given = ["task.name=xglue_nc", f"task.data={data}", "task.partition=by-column"]
    return hub.task(*given, *model, *clients, f"task.groups={','.join(LANGUAGES)}", *more)


def refused(build: Callable[[], Task], *says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build().partition(0)
    message = str(caught.value)
    assert "\n" not in message
    assert [text for text in says if text not in message] == []


def test_a_client_holds_one_language_of_the_validation_split(xglue: Path, model: list[str]) -> None:
    found = news_task(xglue, model)
    for client in range(3):
        ids = whole(found.partition(client))["input_ids"]
        # The title, which is another word in each split, comes first after the token for the beginning.
        assert set(ids[:, 1].tolist()) == {4 + 1 + client}
    assert len(found.test_examples()) == 90


def test_padding_reaches_the_longest_of_a_batch_and_tells_where_texts_end(
    xglue: Path, model: list[str]
) -> None:
    found = news_task(xglue, model).partition(0)
    batch = found.store.batch(found.indices[:5])
    lengths = batch["attention_mask"].sum(1)
    width = batch["input_ids"].shape[1]
    assert width % text.MULTIPLE == 0
    assert width - text.MULTIPLE < lengths.max() <= width
    for row, mask in zip(
        batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True
    ):
        end = row.index(2) + 1
        assert mask == [1] * end + [0] * (width - end)
        assert set(row[end:]) <= {1}


def test_scores_do_not_depend_on_padding(xglue: Path, model: list[str]) -> None:
    found = news_task(xglue, model)
    net = found.build_model().eval()
    part = found.partition(1)
    with torch.no_grad():
        together = found.logits(net, part.store.batch(part.indices[:6]))
        alone = [found.logits(net, part.store.batch(part.indices[i : i + 1])) for i in range(6)]
    assert together.shape == (6, 3)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_decoder_scores_each_text_at_its_last_token(xglue: Path, tmp_path: Path) -> None:
    """Its tokenizer has no token for padding, and the one that pads instead ends every text."""
    weights = hub.gpt2(tmp_path / "gpt2")
    found = news_task(xglue, ["model.name=transformers/gpt2", f"model.weights={weights}"])
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


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(kind: str, tmp_path: Path) -> None:
    columns: dict[str, list[object]] = {"text": ["w1"], "label": ["a", "b"]}
    found = rows_task(tmp_path, limited(kind, tmp_path, vocab_size=40), columns)
    with pytest.raises(ConfigError, match=r"ids up to \d+, but .* knows 40 .*model\.tokenizer"):
        found.build_model()


def test_long_texts_are_cut(xglue: Path, model: list[str]) -> None:
    masks = whole(news_task(xglue, model, "task.max-tokens=8").partition(0))["attention_mask"]
    assert masks.sum(1).max() == 8


def test_test_texts_of_like_length_are_beside_each_other(xglue: Path, model: list[str]) -> None:
    masks = whole(news_task(xglue, model).test_examples())["attention_mask"]
    lengths = masks.sum(1).tolist()
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 5


def test_texts_are_tokenised_once_a_machine(
    xglue: Path, model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect 10 of the released code."""
    first = whole(news_task(xglue, model).partition(2))

    class Broken:
        """Knows what a tokenizer is, but not how to work."""

        pad_token_id, eos_token_id = 1, 2

        def __call__(self, *_: object, **__: object) -> None:
            raise AssertionError("tokenised again")

    loaded = text.load_tokenizer(hub.config(*model).model)
    key = text.tokenizer_key(loaded)
    monkeypatch.setattr(text, "load_tokenizer", lambda _: Broken())
    monkeypatch.setattr(text, "tokenizer_key", lambda _: key)
    again = whole(news_task(xglue, model).partition(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    with pytest.raises(AssertionError, match="tokenised again"):
        news_task(xglue, model, "task.max-tokens=9").partition(2)


def test_a_used_tokenizer_has_the_key_of_a_new_one(model: list[str]) -> None:
    section = hub.config(*model).model
    fresh, used = text.load_tokenizer(section), text.load_tokenizer(section)
    used(["w1 w2"] * 3, truncation=True, max_length=2, padding=True)
    assert text.tokenizer_key(fresh) == text.tokenizer_key(used)


# ------------------------------------------------------------------------------- other layouts
def test_a_table_with_a_column_of_languages(tmp_path: Path, model: list[str]) -> None:
    """As SIB-200 and MasakhaNEWS can be had."""
    for split, count in (("train", 90), ("test", 30)):
        made = hub.news(WORDS, count, 3)
        columns = {**made, "language": [LANGUAGES[i % 3] for i in range(count)]}
        hub.parquet(tmp_path / f"{split}-00000-of-00001.parquet", columns, label=LABELS)
    found = news_task(
        tmp_path,
        model,
        "task.groups=ru,en",
        "federation.clients=2",
        "federation.clients-per-round=2",
    )
    parts = [found.partition(i) for i in range(2)]
    assert [len(part) for part in parts] == [30, 30]
    assert len(found.test_examples()) == 20
    refused(lambda: news_task(tmp_path, model, "task.groups=ru,xx"), "'xx'", "de, en, ru")


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
def test_a_file_for_each_split_and_language(suffix: str, tmp_path: Path, model: list[str]) -> None:
    """As MasakhaNEWS and SIB-200 are on the hub: de/train.tsv."""
    for language in LANGUAGES:
        (tmp_path / language).mkdir()
        for split in ("train", "dev"):
            made = hub.news(WORDS, 24, 3)
            rows = [(t, LABELS.names[y]) for t, y in zip(made["text"], made["label"], strict=True)]
            if suffix == "jsonl":
                lines = [json.dumps({"text": t, "category": y}) for t, y in rows]
            else:
                mark = {"tsv": "\t", "csv": ","}[suffix]
                lines = [mark.join(row) for row in [("text", "category"), *rows]]
            (tmp_path / language / f"{split}.{suffix}").write_text("\n".join(lines))
    found = news_task(tmp_path, model)
    assert [len(found.partition(i)) for i in range(3)] == [24, 24, 24]
    assert len(found.test_examples()) == 72
    assert found.classes == ("finance", "news", "sports")  # type: ignore[attr-defined]
    refused(
        lambda: news_task(tmp_path, model, "task.groups=de,es"), "no language 'es'", "task.groups"
    )


def test_the_whole_repository_is_read_by_its_subset(
    xglue: Path, model: list[str], tmp_path: Path
) -> None:
    """Other subsets have splits by language, too."""
    shutil.copytree(xglue, tmp_path / "xglue")
    for split in ("validation.de", "test.en"):
        file = tmp_path / f"xglue/mlqa/{split}-00000-of-00001.parquet"
        hub.parquet(file, {"context": ["w1"], "question": ["w2"]})
    assert len(news_task(tmp_path / "xglue", model).test_examples()) == 90
    command = "`hf download hgissbkh/xglue --repo-type dataset --include 'nc/*' --local-dir DIR`"
    given = ["task.name=xglue_nc", "task.partition=by-column"]
    refused(lambda: hub.task(*given, *model), command, "task.data=DIR/nc")


def test_a_custom_table_of_text_spread_by_dirichlet(tmp_path: Path, model: list[str]) -> None:
    made = hub.news(WORDS, 100, 2)
    lines = [
        json.dumps({"review": t, "stars": y + 1})
        for t, y in zip(made["text"], made["label"], strict=True)
    ]
    file = tmp_path / "reviews.jsonl"
    file.write_text("\n".join(lines))
    given = ["task.name=custom", f"task.data={file}", "task.alpha=2", "federation.clients=3"]
    columns = ["task.input-columns=review", "task.label-column=stars"]
    found = hub.task(*given, "federation.clients-per-round=3", *columns, *model)
    parts = [found.partition(i).indices for i in range(3)]
    assert len(np.unique(np.concatenate([*parts, found.test_examples().indices]))) == 100
    assert found.classes == ("1", "2")  # type: ignore[attr-defined]
    refused(
        lambda: hub.task(*given, "federation.clients-per-round=3", *model),
        "none of the columns text is there",
        "review, stars",
        "task.input-columns",
    )


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


# ------------------------------------------------------------------------------- wrong rows
@pytest.mark.parametrize("layout", ["table.csv", "folder/train.csv"])
def test_commas_outside_quotes_shift_no_column(
    layout: str, tmp_path: Path, model: list[str]
) -> None:
    """Read as they are, the label's column would hold the text's beginning."""
    file = tmp_path / layout
    file.parent.mkdir(exist_ok=True)
    file.write_text("label,text\n" + "".join(f"{'ab'[i % 2]},w1, w2\n" for i in range(40)))
    data = file if file.parent == tmp_path else file.parent
    says = [str(data), "more fields than the header", "put text with commas in quotes"]
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


def rows_task(folder: Path, model: list[str], columns: dict[str, list[object]], *more: str) -> Task:
    """A task on a table of JSON lines: several values in turn, 60 rows."""
    file = folder / "table.jsonl"
    rows = [{name: cells[i % len(cells)] for name, cells in columns.items()} for i in range(60)]
    file.write_text("\n".join(map(json.dumps, rows)))
    few = ["federation.clients=2", "federation.clients-per-round=2", "task.partition=iid"]
    return hub.task("task.name=custom", f"task.data={file}", *few, *model, *more)


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
