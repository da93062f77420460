"""Questions of five sets, with their right answers; the model's own rows for the letters score them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from datasets import Dataset

from layerfed.client.objective import objective
from layerfed.config import ConfigError
from layerfed.task import loading
from layerfed.task.qa import LETTERS, SOURCES, QuestionAnswering
from tests.task import hub
from tests.task.hub import refused, whole


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub.questions(tmp_path_factory.mktemp("qa"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub.llama(tmp_path_factory.mktemp("llama"))


def qa_task(data: Path, weights: Path, *more: str) -> QuestionAnswering:
    given = ["task.name=qa", f"task.data={data}", "task.partition=by-column"]
    model = ["model.name=transformers/meta-llama/Llama-2-7b-hf", f"model.weights={weights}"]
    found = hub.task(*given, *model, *more)
    assert isinstance(found, QuestionAnswering)
    return found


def test_two_clients_a_set_and_each_question_with_its_answer(data: Path, weights: Path) -> None:
    found = qa_task(data, weights)
    choices = {"sciq": 4, "openbookqa": 4, "piqa": 2, "arc-easy": 4, "arc-challenge": 3}
    for client in range(10):
        batch = whole(found.partition(client))
        name = list(SOURCES)[client // 2]
        assert len(batch["label"]) == 20
        assert set(batch["choices"].tolist()) == {choices[name]}
        for ids, mask, label in zip(
            batch["input_ids"], batch["attention_mask"], batch["label"].tolist(), strict=True
        ):
            words = found.tokenizer.decode(ids[: mask.sum()]).split()
            # What is read ends where the answer's letter would be.
            assert words[0] == "<s>"
            assert words[-2:] == ["Answer", ":"]
            at = words.index(LETTERS[label])
            assert words[at : at + 3] == [LETTERS[label], ".", "yes"]
        # The place of the right answer tells nothing.
        assert len(set(batch["label"].tolist())) == choices[name]


def test_the_sets_come_from_the_hub(
    data: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the library finds them there: by their cards, and PIQA's conversion without."""
    asked = []

    def builder(name: str, *args: object, **more: object) -> object:
        asked.append((name, more.get("revision")))
        folder = str(data / name.rpartition("/")[2])
        return datasets.load_dataset_builder(folder, *args, **more)

    monkeypatch.setattr(loading, "load_dataset_builder", builder)
    found = qa_task(data, weights, "task.data=")
    assert [len(found.partition(i)) for i in range(10)] == [20] * 10
    assert len(found.test_examples()) == 50
    assert asked == [(source.hub, source.revision) for source in SOURCES.values()]


def test_what_is_not_there_is_named_with_the_command_that_brings_it(
    data: Path, weights: Path, tmp_path: Path
) -> None:
    """Into the folder where it is looked for; PIQA from a branch, since the main one is a script."""
    branch = "--repo-type dataset --revision refs/convert/parquet --local-dir"
    piqa = ["task.groups=piqa", "federation.clients=2", "federation.clients-per-round=2"]
    there = [f"`hf download ybisk/piqa {branch} DIR/piqa`", "set task.data=DIR"]
    refused(lambda: qa_task(data, weights, "task.data=", *piqa), *there)
    refused(lambda: qa_task(tmp_path, weights, *piqa), f"{branch} {tmp_path / 'piqa'}`")


def test_piqa_is_tested_on_its_validation_split(data: Path, weights: Path) -> None:
    found = qa_task(
        data, weights, "task.groups=piqa", "federation.clients=2", "federation.clients-per-round=2"
    )
    test = whole(found.test_examples())
    assert len(test["label"]) == 10
    assert set(test["label"].tolist()) == {0, 1}


def test_scores_are_the_full_models_at_the_answers_position(data: Path, weights: Path) -> None:
    found = qa_task(data, weights)
    net = found.build_model().eval()
    full = transformers.LlamaForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
    for client in (0, 4, 9):
        part = found.partition(client)
        batch = part.store.batch(part.indices[:7])
        with torch.no_grad():
            scores = found.logits(net, batch)
            for row in range(7):
                length = int(batch["attention_mask"][row].sum())
                ids = batch["input_ids"][row : row + 1, :length]
                expected = full(input_ids=ids).logits[0, -1, list(found.letters)]
                count = int(batch["choices"][row])
                torch.testing.assert_close(
                    scores[row, :count], expected[:count], rtol=1e-4, atol=1e-5
                )
                assert torch.isneginf(scores[row, count:]).all()
        assert torch.isfinite(found.loss(net, batch))


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_the_letters_rows_and_the_final_norm(
    tied: bool, data: Path, tmp_path: Path
) -> None:
    weights = hub.llama(tmp_path / "llama", tie_word_embeddings=tied)
    found = qa_task(data, weights)
    net = found.build_model()
    layers = found.layers(net)
    assert layers.num_blocks == 3
    assert set(layers.head.parameters) == {"model.norm.weight", "lm_head.weight"}
    assert "model.embed_tokens.weight" in layers.embeddings.parameters
    full = transformers.LlamaForCausalLM.from_pretrained(weights, dtype=torch.float32)
    rows = full.get_output_embeddings().weight[list(found.letters)]
    assert torch.equal(net.get_parameter("lm_head.weight"), rows)
    assert layers.aliases == {}


def test_long_questions_keep_their_end(data: Path, weights: Path) -> None:
    found = qa_task(data, weights, "task.max-tokens=10")
    batch = whole(found.partition(0))
    assert batch["attention_mask"].sum(1).tolist() == [10] * 20
    words = found.tokenizer.decode(batch["input_ids"][0, :10]).split()
    assert (words[0], words[-2:]) == ("<s>", ["Answer", ":"])


def test_a_model_that_does_not_fit_is_refused(data: Path, weights: Path, tmp_path: Path) -> None:
    small = hub.llama(tmp_path / "llama", vocab_size=40)
    with pytest.raises(ConfigError, match=r"knows 40 tokens.*model\.tokenizer"):
        qa_task(data, small).build_model()
    with pytest.raises(ConfigError, match=r"task\.max-tokens = 301.* lower it to 296"):
        qa_task(data, weights, "task.max-tokens=301").build_model()


def test_a_set_with_one_split_is_cut(data: Path, weights: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "qa")
    for name in ("train", "test"):
        shutil.rmtree(tmp_path / f"qa/piqa/plain_text/{name}")
    more = ["task.groups=piqa", "federation.clients=1", "federation.clients-per-round=1"]
    found = qa_task(tmp_path / "qa", weights, *more)
    assert (len(found.partition(0)), len(found.test_examples())) == (8, 2)


def test_piqa_without_a_validation_split_is_tested_on_the_other(
    data: Path, weights: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "qa/piqa/plain_text"
    for name, source in (("train", "train"), ("test", "validation")):
        shutil.copytree(data / f"piqa/plain_text/{source}", folder / name)
    more = ["task.groups=piqa", "federation.clients=1", "federation.clients-per-round=1"]
    found = qa_task(tmp_path / "qa", weights, *more)
    assert (len(found.partition(0)), len(found.test_examples())) == (40, 10)


def test_label_smoothing_would_ask_for_choices_that_are_none(data: Path, weights: Path) -> None:
    found = qa_task(data, weights, "train.label-smoothing=0.1")
    with pytest.raises(ConfigError, match=r"train\.label-smoothing = 0\.1 .* 'qa'.*set it to 0$"):
        objective(found, found.build_model(), found.partition(0))


def rewrite(
    folder: Path, path: str, change: Callable[[dict[str, object]], dict[str, object]]
) -> None:
    file = folder / f"{path}.parquet"
    rows = Dataset.from_parquet(str(file), cache_dir=str(folder / "cache")).to_list()
    Dataset.from_list([rows[0], change(rows[1]), *rows[2:]]).to_parquet(str(file))
    shutil.rmtree(folder / "cache")


@pytest.mark.parametrize(
    ("path", "change", "says"),
    [
        (
            "openbookqa/main/train-00000-of-00001",
            {"answerKey": "E"},
            ["openbookqa", "row 1", "answerKey = 'E'", "'A', 'B', 'C', 'D'"],
        ),
        (
            "ai2_arc/ARC-Easy/train-00000-of-00001",
            {"answerKey": ""},
            ["ARC-Easy", "row 1", "answerKey = ''"],
        ),
        ("piqa/plain_text/train/0000", {"label": -1}, ["piqa", "row 1", "label = -1", "0 or 1"]),
        ("sciq/data/train-00000-of-00001", {"correct_answer": None}, ["sciq", "row 1", "missing"]),
        (
            "ai2_arc/ARC-Challenge/train-00000-of-00001",
            {"choices": {"text": ["yes"] * 6, "label": list("ABCDEF")}, "answerKey": "A"},
            ["ARC-Challenge", "row 1", "6 are given", "2 to 5"],
        ),
        (
            "openbookqa/main/train-00000-of-00001",
            {"choices": None},
            ["openbookqa", "row 1", "choices", "two lists"],
        ),
    ],
)
def test_wrong_questions_are_named(
    path: str, change: dict[str, object], says: list[str], data: Path, weights: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "qa")
    rewrite(tmp_path / "qa", path, lambda row: {**row, **change})
    refused(lambda: qa_task(tmp_path / "qa", weights), *says)


def test_a_question_may_be_all_in_its_choices(data: Path, weights: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "qa")
    path = "ai2_arc/ARC-Easy/train-00000-of-00001"
    rewrite(tmp_path / "qa", path, lambda row: {**row, "question": ""})
    more = ["task.groups=arc-easy", "federation.clients=1", "federation.clients-per-round=1"]
    found = qa_task(tmp_path / "qa", weights, *more)
    texts = found.tokenizer.batch_decode(whole(found.partition(0))["input_ids"])
    assert len(texts) == 40
    assert sum(text.startswith("<s> Question : A . ") for text in texts) == 1


def test_labels_that_are_numbers_are_named(data: Path, weights: Path, tmp_path: Path) -> None:
    choices = {"text": ["yes", "no"], "label": [1, 2]}
    rows = [{"question": "w1", "choices": choices, "answerKey": "1"}] * 9
    shutil.copytree(data, tmp_path / "qa")
    for file in (tmp_path / "qa/ai2_arc/ARC-Easy").iterdir():
        Dataset.from_list(rows).to_parquet(str(file))
    says = ["ARC-Easy", "row 0", "answerKey = '1' is not allowed: it should be one of 1, 2"]
    refused(lambda: qa_task(tmp_path / "qa", weights), *says)


def test_choices_of_another_form_are_named(data: Path, weights: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "qa")
    pairs = [{"text": "yes", "label": "A"}, {"text": "no", "label": "B"}]
    rows = [{"question_stem": "w1", "choices": pairs, "answerKey": "A"}] * 9
    for file in (tmp_path / "qa/openbookqa/main").iterdir():
        Dataset.from_list(rows).to_parquet(str(file))
    says = ["openbookqa", "row 0", "choices is of type list", "two lists of one length"]
    refused(lambda: qa_task(tmp_path / "qa", weights), *says)


def test_sets_and_columns_that_are_not_there_are_named(
    data: Path, weights: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "qa")
    shutil.rmtree(tmp_path / "qa/sciq")
    missing = ["no folder sciq", "hf download allenai/sciq", "task.groups"]
    refused(lambda: qa_task(tmp_path / "qa", weights), *missing)
    refused(lambda: qa_task(data, weights, "task.groups=sciq,mmlu"), "'mmlu'", "arc-easy")
    folder = tmp_path / "qa/piqa/plain_text"
    shutil.rmtree(folder)
    folder.mkdir()
    file = folder / "train-00000-of-00001.parquet"
    Dataset.from_dict({"goal": ["a"] * 9, "sol1": ["b"] * 9, "label": [0] * 9}).to_parquet(
        str(file)
    )
    only = ["task.groups=piqa", "federation.clients=1", "federation.clients-per-round=1"]
    missing = ["piqa", "column 'sol2' is missing", "goal, sol1, label"]
    refused(lambda: qa_task(tmp_path / "qa", weights, *only), *missing)


def test_a_tokenizer_without_the_letters_is_refused(
    data: Path, weights: Path, tmp_path: Path
) -> None:
    shutil.copytree(weights, tmp_path / "weights")
    file = tmp_path / "weights/tokenizer.json"
    file.write_text(file.read_text().replace('"E":', '"Ε":'))  # a Greek letter
    file.write_text(file.read_text().replace('"D":', '"Δ":'))
    refused(lambda: qa_task(data, tmp_path / "weights"), "no token of its own", "model.tokenizer")


@pytest.mark.parametrize("columns", ["question,A,C", "question,A,B,C,D,E,F", "question,A"])
def test_letters_that_would_be_read_as_others_are_refused(
    columns: str, data: Path, weights: Path, tmp_path: Path
) -> None:
    file = tmp_path / "asked.csv"
    file.write_text(f"{columns}\n{','.join('x' * len(columns.split(',')))}\n")
    with pytest.raises(ConfigError, match="should have the columns question, A, B and"):
        qa_task(data, weights).read(file)
