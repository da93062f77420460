"""Prompts and answers: what is read, which tokens count, packed batches, and generated answers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from layerfed.client.prediction import predicted_step
from layerfed.client.training import Step, Stepper, selected_layers
from layerfed.client_app import local_optimizer
from layerfed.config import ConfigError, load_config
from layerfed.task import load_task
from layerfed.task.instructions import PLAIN, Instructions, shared_rows
from layerfed.task.overview import describe_data
from layerfed.task.scoring import IGNORED, evaluate_task
from tests.task import hub
from tests.task.hub import refused

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
Rows = Sequence[Mapping[str, object]]
Known = tuple[Instructions, float, Sequence[Mapping[str, str]]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub.chat_llama(tmp_path_factory.mktemp("llama"))


def table(folder: Path, rows: Rows) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def sums(count: int) -> Rows:
    """Prompts and answers of several lengths."""
    return [
        {
            "instruction": "add " * (1 + i % 4),
            "input": f"{i} and {i}" * (i % 2),
            "output": "sum " * (1 + i % 3),
        }
        for i in range(count)
    ]


def asked(folder: Path, weights: Path, rows: Rows, *more: str) -> Instructions:
    given = [f"task.data={table(folder, rows)}", "task.partition=iid", f"model.weights={weights}"]
    some = ["federation.clients=2", "federation.clients-per-round=2", "task.max-tokens=64"]
    fixed = ["task.name=instructions", "model.name=transformers/some/llama", "task.new-tokens=8"]
    found = hub.task(*fixed, *given, *some, *more)
    assert isinstance(found, Instructions)
    return found


def alone(task: Instructions, examples: object) -> list[tuple[list[int], int]]:
    """Each example's tokens, and the number of those before the answer, by the store's own rows."""
    rows = examples.store.rows.select(examples.indices)  # type: ignore[attr-defined]
    return list(zip(rows["input_ids"], rows["prompt"], strict=True))


# ------------------------------------------------------------------------------------ the tokens
@pytest.mark.parametrize(
    ("template", "prompt", "answer"),
    [
        (hub.CHAT, "<|user|>add\n\n2 and 3<|end|>\n<|assistant|>", "five<|end|>"),
        (None, "<s>### Instruction:\nadd\n\n2 and 3\n\n### Response:\n", "five</s>"),
    ],
)
def test_the_loss_is_that_of_the_answer_and_its_end(
    template: str | None, prompt: str, answer: str, tmp_path: Path
) -> None:
    """The template's tokens before the answer, and a line break after its end, do not count."""
    weights = hub.chat_llama(tmp_path / "llama", template)
    task = asked(
        tmp_path, weights, [{"instruction": "add", "input": "2 and 3", "output": "five"}] * 20
    )
    ids = [task.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, answer)]
    batch = next(task.partition(0).in_order(1, CPU))
    length = len(ids[0] + ids[1])
    assert batch["input_ids"][0, :length].tolist() == ids[0] + ids[1]
    assert batch["attention_mask"][0].tolist() == [1] * length + [0] * (-length % 8)
    counts = batch["label"][0] != IGNORED
    assert batch["label"][0][counts].tolist() == ids[1]
    assert batch["scored"][0][counts].tolist() == list(range(len(ids[0]) - 1, length - 1))
    assert task.tokenizer.decode(task.stops) == {None: "</s>"}.get(template, "</s><|end|>")
    assert ("plain template" in task.summary()) == (template is None)
    assert task.preprocessing()["chat_template"] == (template or PLAIN)


def test_a_batch_has_the_loss_of_transformers(weights: Path, tmp_path: Path) -> None:
    task = asked(tmp_path, weights, sums(40), "task.decode-examples=0")
    net = task.build_model()
    full = transformers.LlamaForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
    total = count = 0.0
    for ids, start in alone(task, task.test_examples()):
        row = torch.tensor([ids])
        label = row.clone()
        label[:, :start] = IGNORED
        with torch.no_grad():
            total += float(full(input_ids=row, labels=label).loss) * (len(ids) - start)
        count += len(ids) - start
    found = evaluate_task(task, net, task.test_examples(), 5, CPU)
    assert found.scores["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-5)
    assert found.scores["exact_match"] is None


def test_packed_rows_have_the_loss_and_gradients_of_their_examples(
    weights: Path, tmp_path: Path
) -> None:
    """To rounding, whatever shares a row, whole and in micro-batches."""
    packed = asked(tmp_path, weights, sums(60))
    apart = asked(tmp_path, weights, sums(60), "task.packing=false")
    net = packed.build_model()
    batches = [next(t.client_examples(0)[0].in_order(16, CPU)) for t in (packed, apart)]
    assert len(batches[0]["input_ids"]) < len(batches[1]["input_ids"]) == 16
    assert int((batches[0]["label"] != IGNORED).sum()) == int(
        (batches[1]["label"] != IGNORED).sum()
    )
    # Several examples and room at the end: a row that shows what can go wrong.
    assert (batches[0]["position_ids"][:, 1:] == 0).any()
    losses, gradients = [], []
    for batch, size in ((batches[0], 0), (batches[0], 2), (batches[1], 0), (batches[1], 3)):
        net.zero_grad()
        parts = Step(micro_batch=size).parts(batch, packed.loss)
        assert len(parts) > 1 if size else len(parts) == 1
        values = [packed.loss(net, part) * (1.0 if s is None else s) for part, s in parts]
        torch.stack(values).sum().backward()  # type: ignore[no-untyped-call]
        losses.append(sum(map(float, torch.stack(values).detach())))
        gradients.append(
            torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        )
    for loss, gradient in zip(losses, gradients, strict=True):
        assert loss == pytest.approx(losses[-1], rel=1e-5)
        torch.testing.assert_close(gradient, gradients[-1], rtol=1e-4, atol=1e-6)


def test_an_example_in_a_packed_row_sees_no_other(weights: Path, tmp_path: Path) -> None:
    task = asked(tmp_path, weights, sums(60))
    net = task.build_model()
    batch = next(task.client_examples(0)[0].in_order(4, CPU))
    second = int((batch["position_ids"][0] == 0).nonzero()[1])
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, :second] = 77
    later = batch["scored"][0] >= second
    with torch.no_grad():
        before, after = (task.logits(net, b)[0] for b in (batch, changed))
    torch.testing.assert_close(before[later], after[later])
    assert not torch.allclose(before[~later], after[~later])


def test_a_model_that_mixes_packed_examples_is_refused(tmp_path: Path) -> None:
    """BLOOM has no positions: what it sees follows from the order of tokens alone."""
    weights = hub.chat_llama(tmp_path / "bloom")
    small = transformers.BloomConfig(vocab_size=280, hidden_size=16, n_layer=2, n_head=2)
    transformers.BloomForCausalLM(small).save_pretrained(weights)
    with pytest.raises(ConfigError, match=r"see each other; set task\.packing=false"):
        asked(tmp_path, weights, sums(20)).build_model()
    assert asked(tmp_path, weights, sums(20), "task.packing=false").build_model()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_no_row_overflows_and_none_could_be_spared(lengths: list[int]) -> None:
    rows = shared_rows(lengths, 30)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[i] for i in row) for row in rows)
    assert filled[-1] <= 30
    # The two emptiest rows would not fit into one.
    assert len(filled) == 1 or filled[0] + filled[1] > 30


@given(st.integers(1, 50), st.integers(0, 50))
def test_what_is_too_long_keeps_the_prompts_end_and_the_answers_beginning(
    weights: Path, prompt: int, answer: int
) -> None:
    task = hub.task(
        *("task.name=instructions", "task.partition=iid", "task.max-tokens=16"),
        *("model.name=transformers/some/llama", f"model.weights={weights}"),
    )
    assert isinstance(task, Instructions)
    bos = task.tokenizer.bos_token_id
    first, last = [bos, *range(100, 99 + prompt)], list(range(200, 200 + answer))
    kept, reply = task._fitted(first, last)
    assert len(kept) + len(reply) == min(16, prompt + answer)
    assert len(kept) >= min(prompt, 8)
    assert len(reply) >= min(answer, 8)
    assert kept[0] == bos
    assert kept[1:] == first[len(first) - len(kept) + 1 :]
    assert reply == last[: len(reply)]


def test_text_that_looks_like_the_end_of_an_answer_is_text(weights: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "say <|end|> twice", "completion": "<|END|></s>"}] * 20
    task = asked(tmp_path, weights, rows)
    [(ids, start)] = alone(task, task.partition(0).select(np.array([0])))
    end = task.tokenizer.convert_tokens_to_ids("<|end|>")
    assert ids[:start].count(end) == ids[start:].count(end) == 1
    assert ids[-1] == end
    assert task.tokenizer.eos_token_id not in ids
    assert "say < |end|> twice" in task.tokenizer.decode(ids)


def test_a_template_that_writes_prompts_in_another_way_is_refused(tmp_path: Path) -> None:
    other = "{% for m in messages %}[{{ messages | length }}]{{ m.content }}{% endfor %}"
    weights = hub.chat_llama(tmp_path / "llama", other)
    refused(lambda: asked(tmp_path, weights, sums(20)), "chat template", "model.tokenizer")


# ---------------------------------------------------------------------------------- the columns
LAYOUTS = [
    # FlowerTune's four challenges: general (with a column of the whole text), finance, medical, code.
    ({"instruction": "do", "input": "it", "output": "done", "text": "x"}, "do\n\nit", "done"),
    ({"input": "it", "output": "done", "instruction": "do"}, "do\n\nit", "done"),
    ({"input": "it", "output": "done", "instruction": "do"}, "do\n\nit", "done"),
    ({"output": "done", "instruction": "do", "input": ""}, "do", "done"),
    ({"prompt": "do it", "completion": "done"}, "do it", "done"),
    ({"question": "what", "answer": "that"}, "what", "that"),
    (
        {"instruction": "do", "context": "it", "response": "done", "category": "c"},
        "do\n\nit",
        "done",
    ),
]


@pytest.mark.parametrize(("row", "prompt", "answer"), LAYOUTS)
def test_the_usual_columns_are_found(
    row: dict[str, str], prompt: str, answer: str, weights: Path, tmp_path: Path
) -> None:
    task = asked(tmp_path, weights, [row] * 20)
    [(ids, start)] = alone(task, task.partition(0).select(np.array([0])))
    text = task.tokenizer.decode(ids[:start]), task.tokenizer.decode(ids[start:])
    assert text == (f"<|user|>{prompt}<|end|>\n<|assistant|>", f"{answer}<|end|>")


def test_columns_are_named(weights: Path, tmp_path: Path) -> None:
    rows = [{"ask": "do", "more": "it", "reply": "done", "output": "x"}] * 20
    task = asked(tmp_path, weights, rows, "task.input-columns=more, ask, reply")
    [(ids, _)] = alone(task, task.partition(0).select(np.array([0])))
    assert task.tokenizer.decode(ids).startswith("<|user|>it\n\ndo<|end|>")
    one = asked(tmp_path, weights, rows, "task.input-columns=reply")
    refused(lambda: one, "task.input-columns = 'reply'", "then that of the answer")
    refused(lambda: asked(tmp_path, weights, rows), "none of the columns instruction+input+output")


def test_rows_without_prompt_or_answer_are_left_out_and_counted(
    weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [
        {"prompt": p, "completion": c} for p, c in ((" ", "x"), ("x", ""), ("x", None), (None, "x"))
    ]
    rows = [*bad, *([{"prompt": "x", "completion": "y" * 200}] * 30)]
    task = asked(tmp_path, weights, rows)
    with caplog.at_level(logging.INFO, logger="flwr"):
        assert sum(len(task.partition(i)) for i in range(2)) + len(task.test_examples()) == 30
    assert "of 34 rows 4 are left out" in caplog.text
    assert "30 are cut (task.max-tokens = 64)" in caplog.text
    refused(lambda: asked(tmp_path, weights, bad), "no examples of complete rows to train")


def test_clients_by_group_and_by_category(weights: Path, tmp_path: Path) -> None:
    rows = [{**row, "site": "ab"[i % 2], "kind": "xyz"[i % 3]} for i, row in enumerate(sums(120))]
    by_site = ["task.partition=by-column", "task.group-column=site"]
    found = describe_data(asked(tmp_path, weights, rows, *by_site), 2)
    assert [list(client["groups"]) for client in found["clients"]] == [["a"], ["b"]]
    assert found["classes"] == []
    skewed = ["task.partition=dirichlet", "task.label-column=kind", "task.alpha=0.5"]
    task = asked(tmp_path, weights, rows, *skewed)
    counts = [np.bincount(task.partition(i).column("label"), minlength=3) for i in range(2)]
    assert np.sum(counts, axis=0).tolist() != (2 * np.array(counts[0])).tolist()
    assert task.classes == ()
    with pytest.raises(ConfigError, match=r"name a column of categories by task\.label-column"):
        asked(tmp_path, weights, rows, "task.partition=dirichlet")


# ----------------------------------------------------------------------------- generated answers
@pytest.fixture(scope="module")
def half_known(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Known:
    """A test set of which the model itself, one prompt at a time, gives half of the answers."""
    folder = tmp_path_factory.mktemp("known")
    full = transformers.LlamaForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights)
    rows: list[dict[str, str]] = []
    for i in range(24):
        text = f"<|user|>{'add ' * (1 + i % 5)}{i}<|end|>\n<|assistant|>"
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        made = full.generate(**ids, do_sample=False, max_new_tokens=8, eos_token_id=[1, 5])
        answer = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        right = i % 2 and answer.strip()
        rows.append({"prompt": "add " * (1 + i % 5) + str(i), "completion": right or "no"})
    share = sum(row["completion"] != "no" for row in rows) / len(rows)
    assert 0.2 < share < 1.0  # otherwise the test shows nothing
    for split in ("train", "test"):
        table(folder, rows).rename(folder / f"{split}.jsonl")
    elsewhere = tmp_path_factory.mktemp("unused")
    return asked(elsewhere, weights, [], f"task.data={folder}"), share, rows


def test_exact_match_is_that_of_generating_one_by_one(
    half_known: Known,
) -> None:
    task, share, _ = half_known
    found = evaluate_task(task, task.build_model(), task.test_examples(), 5, CPU)
    assert found.scores["exact_match"] == pytest.approx(share)


def test_only_some_answers_are_generated_and_always_the_same(
    half_known: Known,
) -> None:
    task, _, _ = half_known

    def changed(**settings: object) -> Instructions:
        section = task.config.task.model_copy(update=settings)
        return Instructions(task.config.model_copy(update={"task": section}))

    few = changed(decode_examples=5)
    net = few.build_model()
    for size in (3, 24):
        tally = few.kind()
        for batch in few.test_examples().in_order(size, CPU):
            tally.match(*few.answers(net, batch))  # type: ignore[attr-defined]
        assert tally.sums["answers"] == 5
    with pytest.raises(ConfigError, match=r"raise task\.decode-examples = 0"):
        changed(decode_examples=0, metric="exact_match")


def test_prompts_of_a_file_are_answered(half_known: Known, tmp_path: Path) -> None:
    task, _, rows = half_known
    first, second = [row for row in rows if row["completion"] != "no"][:2]
    (tmp_path / "one.txt").write_text(first["prompt"])
    (tmp_path / "two.csv").write_text(f"prompt,other\n{second['prompt']},x\n{first['prompt']},y\n")
    net = task.build_model()
    for name, wanted in (("one.txt", [first]), ("two.csv", [second, first])):
        batch = next(task.read(tmp_path / name).examples.in_order(10, CPU))
        found, _ = task.answers(net, batch)
        assert found == [row["completion"].strip() for row in wanted]
    (tmp_path / "none.csv").write_text("prompt\n \n")
    with pytest.raises(ConfigError, match=r"row 0: prompt holds no text"):
        task.read(tmp_path / "none.csv")


def test_a_text_file_holds_prompts_whatever_the_answers_are_called(
    weights: Path, tmp_path: Path
) -> None:
    rows = [{"question": f"add {i}", "text": "sum"} for i in range(20)]
    task = asked(tmp_path, weights, rows, "task.input-columns=question,text")
    (tmp_path / "one.txt").write_text("add 2 and 2")
    [(ids, prompt)] = alone(task, task.read(tmp_path / "one.txt").examples)
    assert task.tokenizer.decode(ids) == "<|user|>add 2 and 2<|end|>\n<|assistant|>"
    assert prompt == len(ids)


# ------------------------------------------------------------------------------------- the model
@pytest.mark.parametrize("tied", [False, True])
def test_the_output_layer_may_stay_frozen(tied: bool, tmp_path: Path) -> None:
    weights = hub.chat_llama(tmp_path / "llama", tie_word_embeddings=tied)
    task = asked(tmp_path, weights, sums(20), "model.embeddings=lm_head")
    layers = task.layers(task.build_model())
    assert layers.num_blocks == 3
    assert layers.head.parameters == ("model.norm.weight",)


def test_a_length_beyond_the_models_is_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.new-tokens = 308, but .* reads 300 tokens"):
        asked(
            tmp_path, weights, sums(20), "task.max-tokens=296", "task.new-tokens=12"
        ).build_model()


@pytest.mark.parametrize(("packing", "tokens", "count"), [("true", 26, 8), ("false", 300, 4)])
def test_the_memory_of_the_largest_batch_is_predicted(
    packing: str, tokens: int, count: int, weights: Path, tmp_path: Path
) -> None:
    """As it is measured where rows are full: of one example, or of two that the mask keeps apart."""
    rows = [{"prompt": "x", "completion": "y" * tokens}] * 20
    task = asked(tmp_path, weights, rows, f"task.packing={packing}")
    skeleton, net = task.skeleton(), task.build_model()
    layers, largest = task.layers(net), task.largest_batch(4)
    optimizer = local_optimizer(task.config.train, 0.1, net, layers)
    assert largest is not None
    found = predicted_step(
        *(skeleton, layers, [True] * 3, largest, task.loss, optimizer),
        how=Step(),
        storage="float32",
    )
    real = next(task.client_examples(0)[0].in_order(count, CPU))
    assert {n: t.shape for n, t in largest.items()} == {n: real[n].shape for n in largest}
    with selected_layers(net, layers, layers.names[1:]):
        trained = [p for p in net.parameters() if p.requires_grad]
        step = Stepper(net, trained, task.loss, optimizer, Step())
        _, measured = step.measured(real, 0.0)
    assert found.activations == pytest.approx(measured.activations, rel=0.02)


def test_a_nodes_own_data_and_what_a_run_folder_keeps(tmp_path: Path) -> None:
    weights = hub.chat_llama(tmp_path / "llama", None)
    task = asked(tmp_path, weights, sums(20))
    task.own_data = True
    train, _ = task.client_examples(0)
    assert len(train) == 20
    assert "position_ids" in next(train.in_order(4, CPU))
    task.keep(tmp_path)
    again = asked(tmp_path, weights, [])
    again.recall(tmp_path)
    assert again.tokenizer.chat_template == PLAIN
    assert again.preprocessing() == task.preprocessing()


def test_the_file_that_is_shipped_reads_the_hub(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every challenge by its hub id, without further settings."""
    import datasets

    from layerfed.task import loading

    folder = tmp_path / "hub"
    hub.parquet(
        folder / "data/train-0.parquet", {k: ["a"] * 40 for k in ("instruction", "input", "output")}
    )

    def builder(name: str, *args: object, **more: object) -> object:
        return datasets.load_dataset_builder(str(folder), *args, **more)

    monkeypatch.setattr(loading, "load_dataset_builder", builder)
    for data in ("vicgalle/alpaca-gpt4", "FinGPT/fingpt-sentiment-train"):
        given = [
            f"task.data={data}",
            f"model.weights={weights}",
            "federation.clients=2",
            "task.max-tokens=64",
        ]
        config = load_config(ROOT / "conf/instructions.toml", given)
        task = load_task(config)
        assert len(task.partition(0)) == 20
