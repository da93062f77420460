"""Text models of `transformers`: sequence classifiers, and causal models that answer with a letter."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from torch import nn

from layerfed.config import ConfigError, ModelConfig
from layerfed.models.block_finder import some
from layerfed.models.source import loading, new_weights, require
from layerfed.models.weights import Files, files_of, in_float32, note_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "build_choice_model",
    "build_language_model",
    "build_text_classifier",
    "load_tokenizer",
    "reading_limits",
    "tokenizer_key",
    "type_of_weights",
    "with_whole_output",
]


def load_tokenizer(section: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer that `model.tokenizer` names, or the model's own.

    Raises
    ------
    ConfigError
        If the tokenizer is missing.
    """
    transformers = require("transformers", section.name)
    source, key = _source(section)
    if section.tokenizer or Path(source).exists():
        source, key = _path(section.tokenizer) or source, "model.tokenizer"
    with loading(section, source, key):
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            source, trust_remote_code=False
        )
    return tokenizer


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> object:
    """Return everything that a tokenizer's output depends on, the same in every process."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())
    # Truncation and padding are left out: they are state of the last call, and every call sets them.
    left = ("truncation", "padding")
    kept = {name: part for name, part in json.loads(backend.to_str()).items() if name not in left}
    return type(tokenizer).__name__, json.dumps(kept, sort_keys=True)


def build_text_classifier(
    section: ModelConfig,
    classes: int,
    seed: int,
    *,
    pad_token: int | None = None,
    skeleton: bool = False,
) -> PreTrainedModel:
    """Build a sequence classifier with a new head.

    Parameters
    ----------
    section : ModelConfig
    classes : int
    seed : int
        The run's seed, which draws the head, and all weights if they are random.
    pad_token : int, optional
        The padding token of the rows that the model will read.
    skeleton : bool
        Whether to build the layers without weights, on torch's `meta` device.

    Raises
    ------
    ConfigError
        If the library or the weights are missing. The message says what to do.
    """
    transformers = require("transformers", section.name)
    changes: dict[str, Any] = {"num_labels": classes}
    if pad_token is not None:
        changes["pad_token_id"] = pad_token
    kind = transformers.AutoModelForSequenceClassification
    with new_weights(seed):
        return _build(kind, section, changes, skeleton)


def build_choice_model(
    section: ModelConfig, rows: Sequence[int], seed: int, *, skeleton: bool = False
) -> PreTrainedModel:
    """Build a causal language model whose output layer keeps only some of its rows.

    Parameters
    ----------
    section : ModelConfig
    rows : Sequence[int]
        Token ids of the answers. The model scores these only, and their rows are trained and sent as
        part of the head.
    seed : int
        The run's seed, which draws all weights if they are random.
    skeleton : bool
        Whether to build the layers without weights, on torch's `meta` device.

    Raises
    ------
    ConfigError
        If the library or the weights are missing. The message says what to do.
    """
    with new_weights(seed):
        model = build_language_model(section, seed, skeleton=skeleton)
        full: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        head = nn.Linear(
            full.in_features,
            len(rows),
            bias=full.bias is not None,
            device=full.weight.device,
            dtype=full.weight.dtype,
        )
    with torch.no_grad():
        head.weight.copy_(full.weight[list(rows)])
        if full.bias is not None:
            head.bias.copy_(full.bias[list(rows)])
    # The rows are copies: if output and input embeddings were tied, the input stays frozen.
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(head)  # type: ignore[no-untyped-call]
    if files := files_of(model):
        # Which rows it has does not follow from the file alone.
        mine = {id(parameter) for parameter in head.parameters()}
        drawn = {name for name, p in model.named_parameters() if id(p) in mine}
        note_files(model, replace(files, drawn=files.drawn | drawn))
    return model


def build_language_model(
    section: ModelConfig, seed: int, *, skeleton: bool = False
) -> PreTrainedModel:
    """Build a causal language model; the parameters are those of `build_choice_model`.

    Raises
    ------
    ConfigError
        If the library or the weights are missing. The message says what to do.
    """
    transformers = require("transformers", section.name)
    with new_weights(seed):
        return _build(transformers.AutoModelForCausalLM, section, {}, skeleton)


def with_whole_output(
    model: PreTrainedModel, section: ModelConfig, rows: Sequence[int], seed: int
) -> PreTrainedModel:
    """Return a model of `build_choice_model` with all rows of its output layer.

    The rows of the answers are the model's; the others, which were never trained, are those of the
    weights that `model.weights` names. A model with adapters gives what it has besides them.

    Parameters
    ----------
    model : PreTrainedModel
    section : ModelConfig
    rows : Sequence[int]
        Token ids of the answers.
    seed : int
        The run's seed, which draws all weights if they are random.
    """
    # What training changed would be lost in a checkpoint's half precision.
    whole: Any = in_float32(build_language_model(section, seed))
    full, cut = (m.get_output_embeddings() for m in (whole, cast(Any, model)))
    head = nn.Linear(full.in_features, full.out_features, bias=full.bias is not None)
    head.load_state_dict(full.state_dict())
    with torch.no_grad():
        for name, tensor in cut.state_dict().items():
            head.state_dict()[name][list(rows)] = tensor
    whole.config.tie_word_embeddings = False
    whole.set_output_embeddings(head)
    state = dict(whole.state_dict())
    given = model.state_dict().items()
    taken = {n: t for n, t in given if n in state and t.shape == state[n].shape}
    whole.load_state_dict(taken, strict=False)
    return cast("PreTrainedModel", whole)


def reading_limits(model: nn.Module, pad_token: int) -> tuple[int, int | None]:
    """Return the number of token ids that a model knows and the largest length of a row, or None."""
    net: Any = model
    words, config = net.get_input_embeddings(), net.config.get_text_config()
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if limit is not None and limit < 1:
        raise ConfigError(
            f"model.name names a network of type {config.model_type}, which reads a class at its last "
            "position, where shorter texts are filled up; choose another architecture"
        )
    for module in net.modules():
        # RoBERTa and similar models count positions from the padding token's id.
        offset = isinstance(module, nn.Embedding) and module.padding_idx is not None
        if limit and offset and module is not words and module.num_embeddings == limit:
            return words.num_embeddings, limit - pad_token - 1
    return words.num_embeddings, limit


def _source(section: ModelConfig) -> tuple[str, str]:
    """Return the hub id or folder of the configuration and tokenizer, and the setting that names it."""
    if section.weights == "random":
        return _path(section.architecture), "model.name"
    given = section.weights != "pretrained"
    return _path(section.weights if given else section.architecture), "model.weights"


def _path(text: str) -> str:
    path = Path(os.path.expanduser(text))
    return str(path) if text and path.exists() else text


def _build(
    kind: Any, section: ModelConfig, changes: dict[str, Any], skeleton: bool
) -> PreTrainedModel:
    transformers = require("transformers", section.name)
    source, key = _source(section)
    with loading(section, source, key):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False, **changes)
        model: PreTrainedModel
        if skeleton:
            with torch.device("meta"):
                model = kind.from_config(config, trust_remote_code=False, dtype=torch.float32)
        elif section.weights == "random":
            model = kind.from_config(config, trust_remote_code=False, dtype=torch.float32)
        else:
            files = _weight_files(transformers, source)
            dtype = _widest(files)
            drawn = torch.get_rng_state()
            # Reads safetensors if there are any, else by torch.load, restricted to weights.
            with _quiet(transformers):
                model, report = kind.from_pretrained(
                    source,
                    config=config,
                    dtype=dtype,
                    trust_remote_code=False,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
            _refuse_random_base(model, report, source, section)
            new = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
            if dtype != torch.float32:
                torch.set_rng_state(drawn)
                _draw_in_float32(model, new)
            if files:
                note_files(model, Files(files, frozenset(new)))
    return model


def _weight_files(transformers: Any, source: str) -> tuple[Path, ...]:
    """Return the safetensors files of a folder or hub id, which are mapped and not read; maybe none."""
    find = partial(
        transformers.utils.cached_file, source, _raise_exceptions_for_missing_entries=False
    )
    if (single := find("model.safetensors")) is not None:
        return (Path(single),)
    index = find("model.safetensors.index.json")
    if index is None:
        return ()
    names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
    return tuple(Path(find(name)) for name in sorted(set(names)))


def type_of_weights(section: ModelConfig) -> torch.dtype:
    """Return the type of a local checkpoint's weights; of one that is not here, float32."""
    source = _source(section)[0]
    if section.weights == "random" or not Path(source).is_dir():
        return torch.float32
    return _widest(_weight_files(require("transformers", section.name), source))


def _widest(files: Sequence[Path]) -> torch.dtype:
    """Return the type that holds all of some files' weights as they are: half precision or float32."""
    found = set()
    for file in files:
        with safe_open(file, "pt") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    only = found.pop() if len(found) == 1 else ""
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(only, torch.float32)


def _draw_in_float32(model: PreTrainedModel, names: Collection[str]) -> None:
    """Draw new tensors as in a model in float32: the head must not depend on how the base is stored."""
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        new = [name for name in own if f"{prefix}.{name}" in names]
        for name in new:
            setattr(module, name, nn.Parameter(torch.empty(own[name].shape)))
        if new:
            module._is_hf_initialized = False
    net: Any = model
    net.initialize_weights()


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Suppress the report that the head is new, which is intended; other new weights are refused."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _refuse_random_base(
    model: PreTrainedModel, report: dict[str, Any], source: str, section: ModelConfig
) -> None:
    """Refuse weights that lack more than the head, since the missing ones would silently be random."""
    mismatched = [entry[0] for entry in report["mismatched_keys"]]
    missing = sorted({*report["missing_keys"], *mismatched})
    if type(model).__name__.endswith("ForSequenceClassification"):
        base = f"{model.base_model_prefix}."
        missing = [name for name in missing if name.startswith(base) and ".pooler." not in name]
    if missing:
        raise ConfigError(
            f"'{source}' has no weights of the right size for {some(missing)} of model.name = "
            f"'{section.name}' ({type(model).__name__}); give weights of this architecture "
            "(model.weights)"
        )
