"""Tiny data sets and models, written to disk in the layout in which the hub has them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pixels
from safetensors.torch import save_file

from layerfed.config import ConfigError, RunConfig, load_config
from layerfed.task import Batch, Examples, Task, load_task

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
LETTERS = ["A", "B", "C", "D"]
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 300,
}


def config(*overrides: str) -> RunConfig:
    return load_config(None, overrides)


def task(*overrides: str) -> Task:
    return load_task(config(*overrides))


def refused(build: Callable[[], Task], *says: str) -> None:
    """Expect a task to be refused in one line that says certain things."""
    with pytest.raises(ConfigError) as caught:
        build().partition(0)
    message = str(caught.value)
    assert "\n" not in message
    assert [text for text in says if text not in message] == []


def whole(examples: Examples) -> Batch:
    return next(examples.in_order(len(examples), torch.device("cpu")))


def noise(seed: int, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> Pixels.Image:
    rng = np.random.default_rng(seed)
    return Pixels.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)


def parquet(file: Path, columns: Mapping[str, Sequence[object]], **kinds: object) -> Path:
    """Write a table; columns without a kind are of strings."""
    file.parent.mkdir(parents=True, exist_ok=True)
    features = Features({name: kinds.get(name, Value("string")) for name in columns})
    Dataset.from_dict(dict(columns), features=features).to_parquet(str(file))
    return file


def cifar10(folder: Path, train: int = 120, test: int = 20, **changed: object) -> Path:
    """`uoft-cs/cifar10`: img, label."""
    for split, count, first in (("train", train, 0), ("test", test, 10_000)):
        columns: dict[str, list[object]] = {
            "img": [noise(first + i) for i in range(count)],
            "label": [i % 10 for i in range(count)],
        }
        kinds = {"img": Image(), "label": ClassLabel(names=CIFAR)}
        parquet(folder / f"plain_text/{split}-00000-of-00001.parquet", columns, **kinds)
    return folder


def image_files(folder: Path, names: Sequence[str], count: int, suffix: str = "png") -> Path:
    """Write `count` images into each of some folders."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            noise(1000 * number + i, (40, 30)).save(folder / name / f"{i:03}.{suffix}")
    return folder


def news(words: Sequence[str], count: int, labels: int) -> dict[str, list[object]]:
    """Texts of 1 to 20 words, of which the first goes with the label."""
    rng = np.random.default_rng(len(words))
    labelled = [int(x) for x in rng.integers(0, labels, count)]
    texts = [" ".join([words[y], *rng.choice(words, int(rng.integers(1, 20)))]) for y in labelled]
    return {"text": texts, "label": labelled}


# ------------------------------------------------------------------------------------- models
WORDS = [f"w{i}" for i in range(30)]


def tokenizer(folder: Path) -> Path:
    """A word-level tokenizer in `AutoTokenizer`'s form, which marks beginning and end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    known = [
        *special,
        *WORDS,
        *"ABCDE",
        ".",
        ":",
        "Question",
        "Answer",
        "yes",
        "no",
        "maybe",
        "never",
    ]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return folder


def xlm_roberta(folder: Path, **changes: object) -> Path:
    import transformers

    torch.manual_seed(0)
    settings = transformers.XLMRobertaConfig(**{**TINY, "vocab_size": 60, **changes})
    transformers.XLMRobertaModel(settings).save_pretrained(folder)
    return tokenizer(folder)


def llama(folder: Path, **changes: object) -> Path:
    import transformers

    torch.manual_seed(0)
    settings = transformers.LlamaConfig(**{**TINY, "vocab_size": 60, **changes})
    transformers.LlamaForCausalLM(settings).save_pretrained(folder)
    return tokenizer(folder)


CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_llama(folder: Path, template: str | None = CHAT, **changes: object) -> Path:
    """A LLaMA with a byte-level tokenizer of its own, and its chat template."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|end|>"]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=alphabet)
    raw.train_from_iterator(["what is the sum of two and three", "the sum is five"], trainer)
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **marks)
    made.add_special_tokens({"additional_special_tokens": special[3:]})
    made.chat_template = template
    made.save_pretrained(folder)
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(**{**TINY, "vocab_size": 280, **changes})
    transformers.LlamaForCausalLM(settings).save_pretrained(folder)
    return folder


def gpt2(folder: Path, **changes: object) -> Path:
    """A tokenizer like those of decoders, without a token for padding."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "n_positions": 128, "n_embd": 16, "n_layer": 3, "n_head": 2}
    transformers.GPT2Model(transformers.GPT2Config(**{**sizes, **changes})).save_pretrained(folder)
    file = tokenizer(folder) / "tokenizer_config.json"
    named = json.loads(file.read_text())
    del named["pad_token"]
    file.write_text(json.dumps(named))
    return folder


def clip(folder: Path) -> Path:
    """An open_clip repository: configuration and weights."""
    import open_clip

    vision = {"layers": 3, "width": 64, "patch_size": 16, "image_size": 32, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}
    settings = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    save_file(open_clip.model.CLIP(**settings).state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    written = {"model_cfg": settings, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(written))
    return folder


def timm_vit(folder: Path) -> Path:
    """A timm repository: configuration and weights, for another number of classes."""
    import timm

    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 3, "num_heads": 2}
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", num_classes=7, **sizes)
    folder.mkdir(parents=True)
    save_file(net.state_dict(), folder / "model.safetensors")
    pretrained = {
        "input_size": [3, 32, 32],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "num_classes": 7,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    written = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 7,
        "pretrained_cfg": pretrained,
        "model_args": sizes,
    }
    (folder / "config.json").write_text(json.dumps(written))
    return folder


# ---------------------------------------------------------------------------------- questions
def questions(folder: Path, count: int = 40) -> Path:
    """The five sets as `hf download` leaves them, the right answer of each question the word `yes`."""

    def lettered(names: Sequence[str], i: int) -> dict[str, object]:
        at = i % len(names)
        texts = ["yes" if j == at else "no" for j in range(len(names))]
        return {"choices": {"text": texts, "label": list(names)}, "answerKey": names[at]}

    def write(
        path: str, rows: Sequence[Mapping[str, object]], suffix: str = "-00000-of-00001"
    ) -> None:
        file = folder / f"{path}{suffix}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list([dict(row) for row in rows]).to_parquet(str(file))

    for split in ("train", "test"):
        n = count if split == "train" else 10
        text = [f"{WORDS[i % 30]} {WORDS[i % 7]}" for i in range(n)]
        wrong = {"distractor1": "no", "distractor2": "maybe", "distractor3": "never"}
        write(
            f"sciq/data/{split}",
            [{"question": t, **wrong, "correct_answer": "yes"} for t in text],
        )
        write(
            f"openbookqa/main/{split}",
            [{"question_stem": t, **lettered(LETTERS, i)} for i, t in enumerate(text)],
        )
        for subset, names in (("ARC-Easy", LETTERS), ("ARC-Challenge", ["1", "2", "3"])):
            rows = [{"question": t, **lettered(names, i)} for i, t in enumerate(text)]
            write(f"ai2_arc/{subset}/{split}", rows)
        rows = [
            {"goal": t, "sol1": ["yes", "no"][i % 2], "sol2": ["no", "yes"][i % 2], "label": i % 2}
            for i, t in enumerate(text)
        ]
        # The hub has no answers to PIQA's test questions.
        blank = [{**row, "label": -1} for row in rows]
        # Its repository is a script; the hub's conversion, which has no card, is a branch of it.
        write(f"piqa/plain_text/{'train' if split == 'train' else 'validation'}", rows, "/0000")
        write("piqa/plain_text/test", blank, "/0000")
    folders = {
        "sciq": {"default": "data"},
        "openbookqa": {"main": "main"},
        "ai2_arc": {"ARC-Easy": "ARC-Easy", "ARC-Challenge": "ARC-Challenge"},
    }
    for name, subsets in folders.items():
        card = [
            {
                "config_name": subset,
                "data_files": [
                    {"split": split, "path": f"{inside}/{split}-*"} for split in ("train", "test")
                ],
            }
            for subset, inside in subsets.items()
        ]
        (folder / name / "README.md").write_text(f"---\nconfigs: {json.dumps(card)}\n---\n")
    left = folder / "sciq/.cache/huggingface/download/data"
    left.mkdir(parents=True)
    (left / "train-00000-of-00001.parquet.metadata").write_text("of the download")
    return folder
