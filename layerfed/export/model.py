"""The whole model of a run, written in the form of its own library."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from layerfed.config import ConfigError
from layerfed.config.errors import Failed, naming_extras
from layerfed.export.card import model_card
from layerfed.export.saved import SavedRun
from layerfed.files import whole
from layerfed.models.adapters import merge_adapters, save_adapters
from layerfed.models.image import ImageClassifier, Tower, clip_config
from layerfed.models.source import require
from layerfed.models.text import with_whole_output
from layerfed.task.scoring import CausalLM

if TYPE_CHECKING:
    from layerfed_assets.vit import VisionTransformer

__all__ = ["ExportFormat", "export_run"]

ExportFormat = Literal["native", "onnx", "peft"]
WEIGHTS = "model.safetensors"
# ONNX files end at 2 GiB; the weights of larger models lie beside the graph.
ONE_FILE = 1.9e9


def export_run(
    saved: SavedRun, folder: Path, form: ExportFormat = "native", push_to: str = ""
) -> str:
    """Write a run's whole model, with its model card, and upload it if that is asked for.

    Parameters
    ----------
    saved : SavedRun
    folder : Path
        A new folder, or an empty one.
    form : {"native", "onnx", "peft"}
        The model's own library, a graph for onnxruntime and others, or the adapters for PEFT. In the
        first two forms adapters are merged into the weights, and `saved.model` has none afterwards.
    push_to : str
        The hub's repository to upload to, `owner/name`; it is made, private, if it does not exist.

    Returns
    -------
    str
        The address of the upload; empty without one.

    Raises
    ------
    ConfigError
        If the folder is not empty, or the model cannot be written in this form.
    Failed
        If the upload fails. The folder is there.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty; choose another folder")
    writers = {"native": _native, "onnx": _onnx, "peft": _adapters}
    if form != "peft":
        merge_adapters(saved.model)
    elif push_to and Path(_base(saved)).is_absolute():
        raise ConfigError(
            f"--push-to-hub would tell the base's place on this machine, {_base(saved)}; leave it out, "
            "write in the folder's README.md and adapter_config.json where others find the base, "
            "and upload the folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole(folder) as beside:
        beside.mkdir()
        write, library, code = writers[form](saved)
        write(beside)
        shutil.copyfile(saved.folder / "classes.json", beside / "classes.json")
        card = model_card(saved, library, code)
        (beside / "README.md").write_text(card, encoding="utf-8")
    return _push(folder, push_to) if push_to else ""


Writer = Callable[[Path], None]
Form = tuple[Writer, str, str]
"""A function that writes the model to a folder, the library's name, and the code that loads it."""


def _native(saved: SavedRun) -> Form:
    """Return the form of the library that the model comes from."""
    model = saved.model
    net = model.net if isinstance(model, ImageClassifier) else model
    if isinstance(net, Tower):
        return _open_clip(saved, net)
    # The shipped package may be absent; a model of its class is here only if it was imported.
    shipped = sys.modules.get("layerfed_assets.vit")
    if shipped is not None and isinstance(net, shipped.VisionTransformer):
        return _timm(saved, _as_timm(net, saved))
    # A task of a user's own may have such a model without telling what goes into it.
    if hasattr(net, "pretrained_cfg") and "size" in saved.task.preprocessing():
        return _timm(saved, net)
    if hasattr(net, "save_pretrained") and hasattr(saved.task, "tokenizer"):
        return _transformers(saved, net)
    code = (
        "from safetensors.torch import load_model\n\n"
        f'model = build()  # the model of {saved.config.task.name}\nload_model(model, "{WEIGHTS}")'
    )
    return lambda folder: save_model(net, str(folder / WEIGHTS)), "pytorch", code


# --------------------------------------------------------------------------------------- images
def _as_timm(net: VisionTransformer, saved: SavedRun) -> nn.Module:
    """Return the shipped ViT as timm builds it; names and results are the same."""
    timm = require("timm", "layerfed/vit")
    rows, width = net.pos_embed.shape[1] - 1, net.pos_embed.shape[2]
    patch, first = net.patch_embed.proj.kernel_size[0], cast(Any, net.blocks[0])
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=round(rows**0.5) * patch,
        patch_size=patch,
        embed_dim=width,
        depth=len(net.blocks),
        num_heads=first.attn.heads,
        num_classes=net.head.out_features,
    )
    model.load_state_dict(net.state_dict())
    return model


def _timm(saved: SavedRun, net: Any) -> Form:
    timm = require("timm.models", saved.config.model.name)
    made = saved.task.preprocessing()

    def write(folder: Path) -> None:
        side = (3, made["size"], made["size"])
        described = {
            "input_size": side,
            "interpolation": made["interpolation"],
            "crop_pct": made["crop_share"],
            "crop_mode": "squash" if made["squash"] else "center",
            "mean": made["mean"],
            "std": made["std"],
        }
        described |= {"num_classes": net.num_classes, "tag": ""}  # the tag is that of the base
        net.pretrained_cfg = {**net.pretrained_cfg, **described}
        names = {"label_names": list(saved.task.classes)}
        timm.save_for_hf(net, str(folder), model_config=names, safe_serialization=True)

    code = (
        "import timm\n\n"
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        "logits = model(transform(image)[None])"
    )
    return write, "timm", code


def _open_clip(saved: SavedRun, net: Tower) -> Form:
    made = saved.task.preprocessing()

    def write(folder: Path) -> None:
        config = deepcopy(clip_config(saved.config.model))
        config["vision_cfg"]["image_size"] = made["size"]
        preprocess = {
            "size": [made["size"]] * 2,
            "mean": made["mean"],
            "std": made["std"],
            "interpolation": made["interpolation"],
            "resize_mode": "squash" if made["squash"] else "shortest",
        }
        described = {"model_cfg": config, "preprocess_cfg": preprocess}
        file = folder / "open_clip_config.json"
        file.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        visual = {f"visual.{name}": tensor for name, tensor in net.tower.state_dict().items()}
        head = {f"head.{name}": tensor for name, tensor in net.head.state_dict().items()}
        save_file(_contiguous({**visual, **head}), folder / WEIGHTS)

    code = (
        "import open_clip, torch\nfrom safetensors.torch import load_file\n\n"
        "clip, _, transform = open_clip.create_model_and_transforms(\n"
        '    "local-dir:FOLDER", load_weights=False\n)\n'
        f'state = load_file("FOLDER/{WEIGHTS}")\n'
        "part = lambda p: {k.removeprefix(p): v for k, v in state.items() if k.startswith(p)}\n"
        'clip.visual.load_state_dict(part("visual."))\n'
        f"head = torch.nn.Linear({net.head.in_features}, {net.head.out_features})\n"
        'head.load_state_dict(part("head."))\n'
        "logits = head(clip.visual.eval()(transform(image)[None]))"
    )
    return write, "open_clip", code


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}


# ---------------------------------------------------------------------------------------- texts
def _transformers(saved: SavedRun, net: Any) -> Form:
    task: Any = saved.task
    answers = getattr(task, "letters", None)
    model = (
        net
        if answers is None
        else with_whole_output(net, saved.config.model, answers, saved.config.run.seed)
    )
    if answers is None and saved.task.classes:
        model.config.id2label = dict(enumerate(saved.task.classes))
        model.config.label2id = {name: i for i, name in model.config.id2label.items()}
    tokenizer, kind, use = _reading(saved, model)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    code = (
        f"from transformers import AutoModel{kind}, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
        f'model = AutoModel{kind}.from_pretrained("FOLDER").eval()\n{use}'
    )
    return write, "transformers", code


def _reading(saved: SavedRun, model: Any) -> tuple[Any, str, str]:
    """Return the tokenizer as the run used it, the end of the model's class, and the code of its use.

    The model's configuration gets the token that pads.
    """
    task: Any = saved.task
    answers, generates = getattr(task, "letters", None), issubclass(task.kind, CausalLM)
    tokenizer = deepcopy(task.tokenizer)
    # So that `truncation=True` cuts a text where the run did.
    tokenizer.model_max_length = saved.config.task.max_tokens
    # transformers scores a decoder at the last token that is no padding: no text may end in padding.
    end = tokenizer("x")["input_ids"][-1]
    pads = [token for token in (task.pad, *tokenizer.all_special_ids) if token != end]
    model.config.pad_token_id = pads[0] if pads else None
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pads[0]) if pads else None
    kind = "ForCausalLM" if generates or answers is not None else "ForSequenceClassification"
    use = 'logits = model(**tokenizer([text], truncation=True, return_tensors="pt")).logits'
    if generates:
        tokenizer.padding_side = "left"  # in a batch, an answer follows its prompt
        use = (
            'chat = [{"role": "user", "content": prompt}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)\n'
            'tokens = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]\n'
            "answer = tokenizer.decode(tokens, skip_special_tokens=True)"
        )
    elif answers is not None:
        # Some tokenizers would put an end of text after the cue.
        use = (
            "import torch\n\n"
            f'ids = {task.start_tokens} + tokenizer(text, add_special_tokens=False)["input_ids"]\n'
            "logits = model(torch.tensor([ids])).logits\n"
            f"scores = logits[0, -1, {list(answers)}]  # of {', '.join(task.classes)}"
        )
    return tokenizer, kind, use


def _base(saved: SavedRun) -> str:
    """Return the hub's name of the pretrained base, or its folder."""
    section = saved.config.model
    return section.architecture if section.weights == "pretrained" else section.weights


def _adapters(saved: SavedRun) -> Form:
    config, section, net = saved.config, saved.config.model, cast(Any, saved.model)
    rule = config.server.aggregation
    for key, value, wrong, why in (
        (
            "model.name",
            section.name,
            section.family != "transformers",
            "it is none of transformers",
        ),
        ("model.tuning", section.tuning, section.tuning != "lora", "there are no adapters"),
        ("model.weights", section.weights, section.weights == "random", "the base is in no file"),
        ("server.aggregation", rule, rule == "stack", "the weights beside adapters have changed"),
    ):
        if wrong:
            raise ConfigError(
                f"--format peft cannot hold a model of {key} = '{value}': {why}; use --format native, "
                "which merges adapters into the weights"
            )
    base = _base(saved)
    answers = getattr(saved.task, "letters", None)
    generates = issubclass(saved.task.kind, CausalLM)
    tokenizer, kind, use = _reading(saved, net)
    size = f", num_labels={net.config.num_labels}, pad_token_id={net.config.pad_token_id}"
    task, more = ("CAUSAL_LM", "") if kind == "ForCausalLM" else ("SEQ_CLS", size)

    def write(folder: Path) -> None:
        seed = config.run.seed
        whole = None if answers is None else with_whole_output(net, section, answers, seed)
        save_adapters(net, folder, base, task, whole)
        tokenizer.save_pretrained(folder)
        if generates:
            net.generation_config.save_pretrained(folder)

    code = (
        "from peft import PeftModel\n"
        f"from transformers import AutoModel{kind}, AutoTokenizer{', GenerationConfig' * generates}\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
        f'base = AutoModel{kind}.from_pretrained({base!r}, dtype="float32"{more})\n'
        + 'base.generation_config = GenerationConfig.from_pretrained("FOLDER")\n' * generates
        + f'model = PeftModel.from_pretrained(base, "FOLDER").eval()\n{use}'
    )
    return write, "peft", code


# ----------------------------------------------------------------------------------------- ONNX
class _Scores(nn.Module):
    """A task's scores as a module whose inputs are the tensors of a batch."""

    def __init__(self, saved: SavedRun, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self._logits, self._names = saved.model, saved.task.logits, names

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the scores, shape (B, classes)."""
        return self._logits(self.model, dict(zip(self._names, tensors, strict=True)))


def _onnx(saved: SavedRun) -> Form:
    example = saved.task.example()
    if example is None:
        raise ConfigError(
            f"--format onnx needs an example of the model's inputs; give task.name = "
            f"'{saved.config.task.name}' a method `example`"
        )
    names = tuple(example)

    def write(folder: Path) -> None:
        for library in ("onnx", "onnxscript"):
            require(library, "--format onnx")
        # A dimension of one would be taken for a constant.
        tensors = tuple(torch.cat([tensor] * 2) for tensor in example.values())
        batch, tokens = torch.export.Dim.AUTO, torch.export.Dim.AUTO
        varies = tuple(
            {0: batch, 1: tokens} if t.ndim == 2 and not t.is_floating_point() else {0: batch}
            for t in tensors
        )
        try:
            with torch.no_grad():
                torch.onnx.export(
                    _Scores(saved, names).eval(),
                    tensors,
                    str(folder / "model.onnx"),
                    input_names=list(names),
                    output_names=["logits"],
                    dynamic_shapes=(varies,),
                    dynamo=True,
                    external_data=sum(t.nbytes for t in saved.model.parameters()) > ONE_FILE,
                    verbose=False,
                )
        except Exception as error:  # the exporter raises many types; the user needs the reason only
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"this model cannot be written as ONNX: {type(error).__name__}: {reason}; use --format "
                "native"
            ) from error

    inputs = ", ".join(f'"{name}": {name}' for name in names)
    code = (
        "import onnxruntime\n\n"
        'session = onnxruntime.InferenceSession("FOLDER/model.onnx")\n'
        f'[logits] = session.run(["logits"], {{{inputs}}})'
    )
    return write, "onnx", code


def _push(folder: Path, repository: str) -> str:
    """Upload a folder to the hub, with the token of `hf auth login`; return its address."""
    with naming_extras("--push-to-hub"):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["no more is said"])[0]
        raise Failed(
            f"--push-to-hub {repository}: {type(error).__name__}: {reason}; the model is in {folder}; "
            f"after `hf auth login`, `hf upload {repository} {folder}` uploads it"
        ) from None
    return f"{api.endpoint}/{repository}"
