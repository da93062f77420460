"""Texts by language: tokenised once, with the least padding, and refused if they are wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel

from layerfed.task import Task, text
from tests.task import hub
from tests.task.hub import WORDS, refused, whole

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
