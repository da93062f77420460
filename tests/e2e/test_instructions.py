"""Whole runs of a tiny LLaMA on instructions: layers, adapters, kept prefixes, and an export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file
from typer.testing import CliRunner

from layerfed.cli import app
from layerfed.config import ConfigError, RunConfig, load_config
from layerfed.engine import run_on
from layerfed.export import SavedRun, export_run, predictions
from layerfed.runs import read_lines
from tests.task import hub

ROOT = Path(__file__).parents[2]
LORA = ["model.tuning=lora", "model.lora-targets=q_proj, v_proj", "train.lr=0.1"]
VARIANTS = {
    "layers": [],
    "lora": LORA,
    "FedIT": ["strategy.name=full", *LORA],
    "taught": [
        *("strategy.name=full", "model.embeddings=", "train.lr=0.03", "train.local-steps=40"),
        "task.metric=exact_match",
    ],
    "cached": ["train.prefix-cache=5", "strategy.name=top"],
    "uncached": ["strategy.name=top", "task.packing=false", "train.checkpointing=true"],
}


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[RunConfig, Path]]:
    """Runs of the shipped file by name; the prompt names the answer."""
    root, made = tmp_path_factory.mktemp("runs"), {}
    weights = hub.chat_llama(root / "llama")
    rows = [{"instruction": f"say {w}", "output": w} for w in ("five", "three", "sum") * 30]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def finish(name: str) -> tuple[RunConfig, Path]:
        if name not in made:
            given = [
                *(f"task.data={root / 'rows.jsonl'}", f"model.weights={weights}"),
                *("task.max-tokens=64", "task.new-tokens=8", "task.test-share=0.2"),
                *("federation.clients=3", "federation.clients-per-round=3", "federation.rounds=3"),
                *("budget.layers=1", "train.lr=0.05", "train.local-steps=5", "run.device=cpu"),
                *(f"run.dir={root}", f"run.name={name}", "run.threads=1", "task.local-test=0.2"),
            ]
            config = load_config(ROOT / "conf/instructions.toml", [*given, *VARIANTS[name]])
            made[name] = config, run_on("inprocess", config)
        return made[name]

    return finish


@pytest.mark.parametrize("name", ["layers", "lora", "FedIT"])
def test_answers_are_learnt(name: str, finished: Callable[[str], tuple[RunConfig, Path]]) -> None:
    _, folder = finished(name)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["failures"]) == ("completed", 0)
    assert summary["metric"]["name"] == "perplexity"
    before, after = (summary[key]["perplexity"] for key in ("initial_scores", "scores"))
    assert after < 0.9 * before
    assert summary["scores"]["exact_match"] is not None
    masks = np.array([row["masks"] for row in read_lines(folder / "selection.jsonl")])
    assert masks.sum(-1).tolist() == [[3 if name == "FedIT" else 1] * 3] * 3
    # The output layer is never sent.
    changed = load_file(folder / "final.safetensors")
    assert "model.norm.weight" in changed
    assert not any("lm_head" in tensor or "embed" in tensor for tensor in changed)
    assert any("lora_A" in tensor for tensor in changed) == (name != "layers")


def test_a_model_that_trains_whole_answers_exactly(
    finished: Callable[[str], tuple[RunConfig, Path]], tmp_path: Path
) -> None:
    """The template, the end of an answer and greedy decoding fit what was trained."""
    folder = finished("taught")[1]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["initial_scores"]["exact_match"] == 0
    assert summary["best"]["value"] == summary["scores"]["exact_match"] == 1
    (tmp_path / "prompts.csv").write_text("instruction\nsay sum\nsay three\n")
    rows = predictions(SavedRun.open(folder), [tmp_path / "prompts.csv"])
    assert [row["answer"] for row in rows] == ["sum", "three"]


def test_a_kept_prefix_gives_the_same_run(
    finished: Callable[[str], tuple[RunConfig, Path]],
) -> None:
    cached, without = finished("cached")[1], finished("uncached")[1]
    assert sum(row["prefix_hits"] for row in read_lines(cached / "metrics.jsonl")) > 0
    for key in ("initial_scores", "scores"):
        scores = [json.loads((f / "summary.json").read_text())[key] for f in (cached, without)]
        assert scores[0]["perplexity"] == pytest.approx(scores[1]["perplexity"], rel=1e-2)


@pytest.mark.parametrize("name", ["taught", "lora"])
def test_the_exported_model_answers_as_the_run_does(
    name: str, finished: Callable[[str], tuple[RunConfig, Path]], tmp_path: Path
) -> None:
    """Through transformers alone, by the lines of the model card: template, end and greedy decoding."""
    saved = SavedRun.open(finished(name)[1])
    prompts = ["say five", "say sum and three"]
    table = tmp_path / "prompts.csv"
    table.write_text("\n".join(["instruction", *prompts]) + "\n")
    ours = [str(row["answer"]) for row in predictions(saved, [table])]
    if name == "taught":
        with pytest.raises(ConfigError, match="there are no adapters; use --format native"):
            export_run(saved, tmp_path / "adapter", "peft")
    else:
        export_run(saved, tmp_path / "adapter", "peft")
    export_run(saved, tmp_path / "out")
    for folder in sorted(
        path for path in (tmp_path / "adapter", tmp_path / "out") if path.exists()
    ):
        card = (folder / "README.md").read_text()
        assert "pipeline_tag: text-generation" in card
        code = card.partition("```python\n")[2].partition("```")[0].replace("FOLDER", str(folder))
        for prompt, answer in zip(prompts, ours, strict=True):
            found: dict[str, object] = {"prompt": prompt}
            exec(code, found)
            assert str(found["answer"]).strip() == answer
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.do_sample, settings.max_new_tokens) == (False, 8)


def test_the_data_are_described(
    finished: Callable[[str], tuple[RunConfig, Path]], tmp_path: Path
) -> None:
    config = str(finished("layers")[1] / "config.json")
    shown = CliRunner().invoke(
        app, ["data", config, "run.name=x", "--picture", str(tmp_path / "p.png")]
    )
    assert shown.exit_code == 0, shown.output
    assert "3, of" in shown.stdout
