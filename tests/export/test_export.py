"""Exported models give the run's scores in their own libraries, on the same raw files."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import open_clip
import peft
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import layerfed_assets
from layerfed.cli import app
from layerfed.config import ConfigError
from layerfed.config.errors import Failed
from layerfed.engine import run_on
from layerfed.export import SavedRun, export_run, predictions
from layerfed.export.card import model_card
from tests.conftest import TinyNet
from tests.task import hub
from tests.task.hub import WORDS
from tests.tiny_task import TinyTask, configured

cli = CliRunner()
SMALL = [
    *("federation.clients=2", "federation.rounds=1", "strategy.name=top", "run.device=cpu"),
    *("train.local-steps=1", "train.lr=0.5", "train.batch-size=4", "run.threads=1", "run.name=run"),
]


def images(root: Path) -> list[str]:
    """Photos whose sides have no whole ratio, so that a crop that is off by a pixel shows."""
    for name, size in (("cat", (53, 40)), ("dog", (40, 71))):
        (root / "data" / name).mkdir(parents=True)
        for i in range(12):
            hub.noise(i, size).save(root / f"data/{name}/{i:02}.png")
    return ["task.name=custom", f"task.data={root / 'data'}", "task.alpha=5"]


def texts(root: Path, name: str) -> list[str]:
    made = hub.news(WORDS, 40, 3)
    lines = [
        ["text", "label"],
        *zip(made["text"], (f"class {y}" for y in made["label"]), strict=True),
    ]
    root.joinpath("data").mkdir()
    with (root / "data/texts.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    model = [f"model.name=transformers/{name}", f"model.weights={root / 'model'}"]
    return ["task.name=custom", f"task.data={root / 'data/texts.csv'}", "task.alpha=5", *model]


def with_timm(root: Path) -> list[str]:
    hub.timm_vit(root / "model")
    return [*images(root), "model.name=timm/x", f"model.weights={root / 'model'}"]


def with_clip(root: Path) -> list[str]:
    hub.clip(root / "model")
    (root / "model/README.md").write_text("---\nlicense: mit\n---\n")
    return [*images(root), "model.name=open_clip/x", f"model.weights={root / 'model'}"]


def with_shipped(root: Path) -> list[str]:
    return images(root)


def with_encoder(root: Path) -> list[str]:
    hub.xlm_roberta(root / "model")
    return texts(root, "xlm-r")


def with_decoder(root: Path) -> list[str]:
    hub.gpt2(root / "model")
    return texts(root, "gpt2")


def with_questions(root: Path) -> list[str]:
    hub.questions(root / "data")
    hub.llama(root / "model")
    model = ["model.name=transformers/llama", f"model.weights={root / 'model'}"]
    return ["task.name=qa", f"task.data={root / 'data'}", "task.groups=sciq,piqa", *model]


def in_bfloat16(root: Path) -> list[str]:
    """Questions for a checkpoint in half precision."""
    settings = with_questions(root)
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(root / "model", dtype=torch.bfloat16).save_pretrained(root / "model")
    return settings


FAMILIES: dict[str, Callable[[Path], list[str]]] = {
    "timm": with_timm,
    "open_clip": with_clip,
    "shipped": with_shipped,
    "encoder": with_encoder,
    "decoder": with_decoder,
    "questions": with_questions,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the root of a family's run: `run`, `data` and `model`; it is made once."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            root = made[family] = tmp_path_factory.mktemp(family)
            run_on("inprocess", hub.config(*SMALL, *FAMILIES[family](root), f"run.dir={root}"))
            # Neither an export nor a prediction reads the data again.
            shutil.move(root / "data", root / "moved")
        return made[family]

    return of


def exported(root: Path, folder: Path, *more: Any) -> SavedRun:
    saved = SavedRun.open(root / "run")
    export_run(saved, folder, *more)
    return saved


def scores_of(saved: SavedRun, file: Path) -> Tensor:
    """The run's own logits for the inputs in a file."""
    examples = saved.task.read(file).examples
    with torch.no_grad():
        return torch.cat(
            [
                saved.task.logits(saved.model, batch)
                for batch in examples.in_order(1, torch.device("cpu"))
            ]
        )


def plain_timm(folder: Path) -> Callable[[Image.Image], Tensor]:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return lambda image: model(transform(image)[None])


def plain_clip(folder: Path) -> Callable[[Image.Image], Tensor]:
    clip, _, transform = open_clip.create_model_and_transforms(
        f"local-dir:{folder}", load_weights=False
    )
    state = load_file(folder / "model.safetensors")

    def part(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}

    clip.visual.load_state_dict(part("visual."))
    head = nn.Linear(16, 2)
    head.load_state_dict(part("head."))
    return lambda image: head(clip.visual.eval()(transform(image)[None]))


@pytest.mark.parametrize(
    ("family", "plain"),
    [("timm", plain_timm), ("open_clip", plain_clip), ("shipped", plain_timm)],
)
def test_images_score_the_same_in_their_own_library(
    family: str,
    plain: Callable[[Path], Callable[[Image.Image], Tensor]],
    runs: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    root = runs(family)
    saved = exported(root, tmp_path / "out")
    model = plain(tmp_path / "out")
    for file in (root / "moved/cat/03.png", root / "moved/dog/05.png"):
        with torch.no_grad():
            theirs = model(Image.open(file))
        torch.testing.assert_close(theirs, scores_of(saved, file), rtol=0, atol=1e-6)
    names = json.loads((tmp_path / "out/classes.json").read_text())["classes"]
    assert names == ["cat", "dog"]


@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_texts_score_the_same_in_transformers(
    family: str, runs: Callable[[str], Path], tmp_path: Path
) -> None:
    root = runs(family)
    saved = exported(root, tmp_path / "out")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    table = root / "moved/texts.csv"
    rows = list(csv.DictReader(table.open()))[:4]
    # The last is longer than the run reads.
    written = [row["text"] for row in rows] + [" ".join(WORDS * 10)]
    with (tmp_path / "some.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in written)])
    ours = scores_of(saved, tmp_path / "some.csv")
    for text, expected in zip(written, ours, strict=True):
        with torch.no_grad():
            theirs = model(**tokenizer([text], truncation=True, return_tensors="pt")).logits[0]
        torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-6)
    assert model.config.id2label == {0: "class 0", 1: "class 1", 2: "class 2"}
    predicted = [row["label"] for row in predictions(saved, [tmp_path / "some.csv"])]
    assert predicted == [model.config.id2label[i] for i in ours.argmax(1).tolist()]


@pytest.mark.parametrize("family", ["encoder", "decoder", "questions", "shipped"])
def test_adapters_are_merged_or_load_in_peft(family: str, tmp_path: Path) -> None:
    lora = ("model.tuning=lora", "model.lora-rank=2", "strategy.name=full")
    small = [setting for setting in SMALL if not setting.startswith("strategy.name")]
    settings = FAMILIES[family](tmp_path)
    run_on("inprocess", hub.config(*small, *lora, *settings, f"run.dir={tmp_path}"))
    saved = SavedRun.open(tmp_path / "run")
    moved = [p for n, p in saved.model.named_parameters() if "lora_B" in n]
    assert all(p.abs().sum() > 0 for p in moved)
    if family == "shipped":
        file = tmp_path / "data/cat/03.png"
        ours = scores_of(saved, file)
        with pytest.raises(
            ConfigError, match=r"--format peft cannot hold .*: it is none of transf"
        ):
            export_run(saved, tmp_path / "adapter", "peft")
        export_run(saved, tmp_path / "out")
        theirs = plain_timm(tmp_path / "out")(Image.open(file))
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
        return
    table = tmp_path / "some.csv"
    asks = family == "questions"
    table.write_text("question,A,B,C\nw1 w2,yes,no,maybe\n" if asks else "text\nw1 w2 w3\n")
    ours = scores_of(saved, table)
    with pytest.raises(ConfigError, match=r"tell the base's place on this machine, .*model; leave"):
        export_run(saved, tmp_path / "adapter", "peft", "me/adapter")
    export_run(saved, tmp_path / "adapter", "peft")
    export_run(saved, tmp_path / "out")
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter")
    if asks:
        kind = transformers.AutoModelForCausalLM
        base = kind.from_pretrained(tmp_path / "model")
        text = "Question: w1 w2\nA. yes\nB. no\nC. maybe\nAnswer:"
        ids = torch.tensor([[0, *tokens(text, add_special_tokens=False)["input_ids"]]])
        row = (0, -1, list(saved.task.letters[:3]))
    else:
        kind = transformers.AutoModelForSequenceClassification
        base = kind.from_pretrained(tmp_path / "model", num_labels=3)
        base.config.pad_token_id = saved.model.config.pad_token_id
        ids, row = tokens(["w1 w2 w3"], return_tensors="pt")["input_ids"], (0,)
    for model in (
        peft.PeftModel.from_pretrained(base, tmp_path / "adapter"),
        kind.from_pretrained(tmp_path / "out"),
    ):
        with torch.no_grad():
            theirs = model.eval()(input_ids=ids).logits[row]
        torch.testing.assert_close(theirs, ours[0][: len(theirs)], rtol=0, atol=1e-5)
    assert tokens.model_max_length == saved.config.task.max_tokens


def test_answers_score_the_same_in_a_causal_model(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    root = runs("questions")
    saved = exported(root, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    table = tmp_path / "questions.csv"
    table.write_text("question,A,B,C\nw1 w2,yes,no,maybe\nw3,no,yes,\n")
    [first, second] = predictions(saved, [table])
    assert (first["input"], second["input"]) == (f"{table}:0", f"{table}:1")
    assert set(second["scores"]) == set("ABCDE")
    assert second["scores"]["C"] == 0
    assert second["answer"] == {"A": "no", "B": "yes"}[second["label"]]
    text = "Question: w1 w2\nA. yes\nB. no\nC. maybe\nAnswer:"
    ids = [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "ABC"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(logits[letters], scores_of(saved, table)[0, :3], rtol=0, atol=1e-6)
    # Rows that no answer needs are those of the base.
    base = transformers.AutoModelForCausalLM.from_pretrained(root / "model").lm_head.weight
    ours = model.lm_head.weight
    other = [i for i in range(len(base)) if i not in saved.task.letters]
    assert torch.equal(base[other], ours[other])
    assert not torch.equal(base, ours)


def test_training_on_a_base_in_half_precision_is_not_rounded_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps of 2e-5 are less than the distance of two numbers in bfloat16."""
    small = [*SMALL, "strategy.name=full", "train.lr=2e-5", "model.storage=bfloat16"]
    run_on("inprocess", hub.config(*small, *in_bfloat16(tmp_path), f"run.dir={tmp_path}"))
    saved = exported(tmp_path, tmp_path / "out")
    assert "model.storage = 'bfloat16': the run scored its model with frozen" in caplog.text
    base = load_file(tmp_path / "model/model.safetensors")
    found, ours = load_file(tmp_path / "out/model.safetensors"), saved.model.state_dict()
    trained = load_file(tmp_path / "run/final.safetensors")
    assert trained.keys() > {"model.layers.0.mlp.up_proj.weight", "lm_head.weight"}
    for name, expected in trained.items():
        kept = found[name][list(saved.task.letters)] if name == "lm_head.weight" else found[name]
        assert torch.equal(kept, expected), name
        assert torch.equal(ours[name], expected), name
    block = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(trained[block], base[block].float())
    assert torch.equal(trained[block].bfloat16(), base[block])


def test_adapters_go_onto_a_base_in_the_precision_of_the_run(tmp_path: Path) -> None:
    """As the card loads it; of itself, transformers would compute with this base in bfloat16."""
    lora = ("model.tuning=lora", "model.lora-rank=2", "strategy.name=full")
    run_on("inprocess", hub.config(*SMALL, *lora, *in_bfloat16(tmp_path), f"run.dir={tmp_path}"))
    saved = exported(tmp_path, tmp_path / "adapter", "peft")
    table = tmp_path / "some.csv"
    table.write_text("question,A,B,C\nw1 w2,yes,no,maybe\n")
    card = (tmp_path / "adapter/README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    text = "Question: w1 w2\nA. yes\nB. no\nC. maybe\nAnswer:"
    made: dict[str, Any] = {"text": text}
    exec(code.replace("FOLDER", str(tmp_path / "adapter")), made)
    scores = made["scores"].detach()[:3]
    torch.testing.assert_close(scores, scores_of(saved, table)[0, :3], rtol=0, atol=1e-5)


def test_an_own_model_is_a_plain_state_dict(tmp_path: Path) -> None:
    config = hub.config(*SMALL, "task.name=tests.tiny_task:TinyTask", f"run.dir={tmp_path}")
    saved = SavedRun.open(run_on("inprocess", config))
    export_run(saved, tmp_path / "out")
    net = TinyNet().eval()
    load_model(net, tmp_path / "out/model.safetensors")
    x = torch.randn(4, 5)
    with torch.no_grad():
        torch.testing.assert_close(net(x), saved.model(x), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="reads no files; give it a method `read`"):
        list(predictions(saved, [tmp_path / "out/README.md"]))
    with pytest.raises(ConfigError, match=r"--format onnx needs an example.*`example`"):
        export_run(saved, tmp_path / "onnx", "onnx")
    assert not (tmp_path / "onnx").exists()


class OfALibrary(TinyNet):
    """A model that can save itself, in a task that does not tell what goes into it."""

    pretrained_cfg: ClassVar[dict[str, str]] = {}

    def save_pretrained(self, folder: Path) -> None:
        raise AssertionError("it would need a tokenizer beside it")


class LibraryTask(TinyTask):
    def build_model(self) -> nn.Module:
        net = OfALibrary()
        net.load_state_dict(super().build_model().state_dict())
        return net


def test_a_librarys_model_in_an_own_task_is_a_state_dict_too(tmp_path: Path) -> None:
    config = hub.config(*SMALL, f"task.name={__name__}:LibraryTask", f"run.dir={tmp_path}")
    export_run(SavedRun.open(run_on("inprocess", config)), tmp_path / "out")
    load_model(TinyNet(), tmp_path / "out/model.safetensors")


@pytest.mark.parametrize("family", ["timm", "encoder"])
def test_onnxruntime_scores_the_same(
    family: str, runs: Callable[[str], Path], tmp_path: Path
) -> None:
    root = runs(family)
    saved = exported(root, tmp_path / "out", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    files = {"timm": [root / "moved/cat/03.png"], "encoder": [root / "moved/texts.csv"]}[family]
    for batch_size in (1, 3):  # and other lengths than the example's
        examples = saved.task.read(files[0]).examples
        batch = next(examples.in_order(batch_size, torch.device("cpu")))
        inputs = {item.name: batch[item.name].numpy() for item in session.get_inputs()}
        with torch.no_grad():
            ours = saved.task.logits(saved.model, batch).numpy()
        [theirs] = session.run(["logits"], inputs)
        np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)


def test_predict_prints_a_row_for_each_input(runs: Callable[[str], Path], tmp_path: Path) -> None:
    root = runs("timm")
    files = [root / "moved/cat/03.png", root / "moved/dog/05.png"]
    table = root / "moved/table.csv"
    table.write_text("image\ncat/03.png\ndog/05.png\n")
    by_file, by_row = (
        cli.invoke(app, ["predict", str(root / "run"), *map(str, given)])
        for given in (files, [table])
    )
    assert (by_file.exit_code, by_row.exit_code) == (0, 0), by_file.stderr + by_row.stderr
    rows = list(csv.DictReader(by_file.stdout.splitlines()))
    assert [row["input"] for row in rows] == list(map(str, files))
    logits = torch.cat([scores_of(SavedRun.open(root / "run"), file) for file in files])
    for row, expected in zip(rows, logits.softmax(1).tolist(), strict=True):
        scores = [float(row["score cat"]), float(row["score dog"])]
        assert scores == pytest.approx(expected, abs=1e-6)
        assert row["label"] == ("cat" if scores[0] >= scores[1] else "dog")
    again = list(csv.DictReader(by_row.stdout.splitlines()))
    assert [row["input"] for row in again] == [f"{table}:0", f"{table}:1"]
    assert [row["label"] for row in again] == [row["label"] for row in rows]
    as_json = cli.invoke(
        app, ["predict", str(root / "run"), str(files[0]), "--format", "json"]
    ).stdout
    assert json.loads(as_json)["label"] == rows[0]["label"]


def test_a_digit_is_read_as_the_data_are(tmp_path: Path) -> None:
    run = run_on("inprocess", hub.config(*SMALL, f"run.dir={tmp_path}"))
    saved = SavedRun.open(run)
    with np.load(layerfed_assets.DIGITS) as raw:
        digits = raw["image"][raw["test"][:3]]
    for digit, expected in zip(
        digits,
        saved.task.test_examples().store.tensors["image"][saved.task.test_examples().indices[:3]],
        strict=True,
    ):
        Image.fromarray((digit.astype(float) * 255 / 16).round().astype(np.uint8)).save(
            tmp_path / "digit.png"
        )
        seen = saved.task.read(tmp_path / "digit.png").examples.store.batch(np.array([0]))
        torch.testing.assert_close(seen["image"][0], expected, rtol=0, atol=0.01)
        deep = (digit.astype(float) * 65535 / 16).round().astype(np.uint16)
        Image.fromarray(deep).save(tmp_path / "deep.png")
        seen = saved.task.read(tmp_path / "deep.png").examples.store.batch(np.array([0]))
        torch.testing.assert_close(seen["image"][0], expected, rtol=0, atol=0.01)
    (tmp_path / "none.png").write_text("no image")
    with pytest.raises(ConfigError, match=r"none.png cannot be decoded"):
        saved.task.read(tmp_path / "none.png")
    card = model_card(saved, "timm", "code")
    assert "# layerfed/vit, fine-tuned on digits" in card
    assert "apache-2.0, of layerfed/vit." in card


def test_the_best_round_is_another_model(runs: Callable[[str], Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs("timm") / "run", tmp_path / "run")
    # A run of one round has one model.
    first, only = SavedRun.open(run, best=True), SavedRun.open(run)
    assert first.round == only.round == 1
    for name, tensor in only.model.state_dict().items():
        assert torch.equal(first.model.state_dict()[name], tensor)
    (run / "best.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no best\.safetensors; leave out --best"):
        SavedRun.open(run, best=True)
    state = {n: t + 1 for n, t in load_file(run / "final.safetensors").items()}
    base = SavedRun.open(run)
    about = {
        "round": "7",
        "base": json.loads((run / "layers.json").read_text())["base"]["fingerprint"],
    }
    save_file(state, run / "best.safetensors", about)
    best = SavedRun.open(run, best=True)
    assert (base.round, best.round) == (1, 7)
    ours, theirs = best.model.state_dict(), base.model.state_dict()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor + 1 if name in state else tensor)


def test_what_is_no_finished_run_is_refused_in_one_line(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    run = shutil.copytree(runs("timm") / "run", tmp_path / "run")
    weights = load_file(runs("timm") / "model/model.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()

    def says(*arguments: object) -> str:
        result = cli.invoke(app, list(map(str, arguments)))
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        return result.stderr

    assert "is no run folder" in says("export", tmp_path, tmp_path / "out")
    assert "not empty" in says("export", run, tmp_path / "full")
    assert "--format onix is unknown; choose one of native, onnx, peft; did you mean onnx?" in says(
        "export", run, tmp_path / "out", "--format", "onix"
    )
    assert "is no file here" in says("predict", run, tmp_path / "none.png")
    final = (run / "final.safetensors").read_bytes()
    (run / "final.safetensors").write_bytes(final[:-10])
    assert "final.safetensors is damaged" in says("predict", run, tmp_path / "full/x")
    (run / "final.safetensors").unlink()
    assert f"--resume {run}" in says("predict", run, tmp_path / "full/x")
    save_file(load_file(runs("timm") / "run/final.safetensors"), run / "final.safetensors")
    assert "its header lacks the round or the base" in says("predict", run, tmp_path / "full/x")
    (run / "final.safetensors").write_bytes(final)
    names = (run / "classes.json").read_bytes()
    for content in (None, b"{"):
        (run / "classes.json").unlink()
        if content is not None:
            (run / "classes.json").write_bytes(content)
        assert "lacks what the task needs of it" in says("export", run, tmp_path / "out")
        (run / "classes.json").write_bytes(names)
    model = shutil.copytree(runs("timm") / "model", tmp_path / "model")
    settings = json.loads((run / "config.json").read_text()) | {"model.weights": str(model)}
    (run / "config.json").write_text(json.dumps(settings))
    save_file({n: t + 1 for n, t in weights.items()}, model / "model.safetensors")
    assert "now holds another base" in says("export", run, tmp_path / "out")


def test_the_card_says_what_the_model_is(runs: Callable[[str], Path], tmp_path: Path) -> None:
    root = runs("open_clip")
    exported(root, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    accuracy = json.loads((root / "run/summary.json").read_text())["accuracy"]
    for text in (
        "license: mit",
        "library_name: open_clip",
        "Classes: cat, dog",
        "Strategy `top`, of 3 selectable layers",
        "Round 1 of 1, with 2 clients a round",
        f"| accuracy | {accuracy:.4g} |",
        "No differential privacy.",
        "mit, of open_clip/x.",
        "computes at 32×32",
    ):
        assert text in card
    assert str(root) not in card
    texts = runs("encoder")
    exported(texts, tmp_path / "texts")
    card = (tmp_path / "texts/README.md").read_text()
    assert "by the tokenizer of transformers/xlm-r." in card
    assert str(texts) not in card


def test_the_card_of_ones_own_model_names_no_other_and_no_licence(tmp_path: Path) -> None:
    config = configured("task.name=tests.tiny_task:TinyTask", f"run.dir={tmp_path}", "run.name=x")
    root = run_on("inprocess", config)
    exported_card = model_card(SavedRun.open(root), "torch", "code")
    assert "# the model of tests.tiny_task:TinyTask, fine-tuned on" in exported_card
    assert "Base: `the model of tests.tiny_task:TinyTask`" in exported_card
    assert "apache" not in exported_card


def test_the_upload_is_the_folder_and_a_failed_one_keeps_it(
    runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    calls: list[tuple[str, dict[str, Any]]] = []
    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "create_repo", lambda self, repo, **more: calls.append((repo, more)))
    monkeypatch.setattr(
        api,
        "upload_folder",
        lambda self, *, repo_id, folder_path: calls.append((repo_id, {"folder": folder_path})),
    )
    saved = SavedRun.open(runs("timm") / "run")
    address = export_run(saved, tmp_path / "out", "native", "me/model")
    assert address.endswith("/me/model")
    assert calls == [
        ("me/model", {"private": True, "exist_ok": True}),
        ("me/model", {"folder": tmp_path / "out"}),
    ]

    def refuse(self: object, repo: str, **more: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(api, "create_repo", refuse)
    with pytest.raises(Failed, match=r"no network; the model is in .*hf upload me/model"):
        export_run(saved, tmp_path / "again", "native", "me/model")
    assert (tmp_path / "again/config.json").exists()
