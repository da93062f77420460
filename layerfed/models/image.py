"""Image classifiers of three families, which map bytes to class scores."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from layerfed.config import ConfigError, ModelConfig, nearest
from layerfed.models.block_finder import lies_in, some
from layerfed.models.source import (
    FILES,
    loading,
    new_weights,
    require,
    shipped_file,
    shipped_vit,
)
from layerfed.models.weights import left_as_they_are, load_weights

__all__ = ["ImageClassifier", "Preprocessing", "Tower", "build_image_classifier", "clip_config"]


@dataclass(frozen=True)
class Preprocessing:
    """How the images were made on which weights were trained, and at which size the model computes.

    Attributes
    ----------
    size : int
        Side of the model's input, in pixels.
    mean, std : tuple[float, ...]
        Mean and deviation of each colour, for values in [0, 1].
    interpolation : str
        Filter of a resize: bicubic, bilinear, lanczos, nearest, box or hamming.
    crop : float
        Share of the resized image's shorter side that is cut out of its middle.
    squash : bool
        Whether both sides are resized to one length, instead of keeping their proportion.
    any_size : bool
        Whether the network takes images of any size, as convolutional ones do.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop: float = 1.0
    squash: bool = False
    any_size: bool = False


class ImageClassifier(nn.Module):
    """A network with the preprocessing of its training: input size, mean and deviation of colours.

    Parameters
    ----------
    net : nn.Module
        Maps normalised images (B, 3, size, size) to scores (B, classes).
    reads : Preprocessing
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, reads: Preprocessing) -> None:
        super().__init__()
        self.reads = reads
        self.register_buffer("mean", torch.tensor(reads.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(reads.std).view(1, 3, 1, 1), persistent=False)
        self.net = net
        # On a processor, convolutions with BatchNorm take 5 to 25% less time if a pixel's channels lie
        # side by side, which outputs keep (benchmarks/evaluation.py). Others gain nothing.
        convolves = any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
        self.format = torch.channels_last if convolves else torch.contiguous_format

    def forward(self, image: Tensor) -> Tensor:
        """Return class scores of images in bytes, shape (B, 3, S, S) with any S."""
        values = image.float() / 255
        if values.shape[-1] != self.reads.size:
            # CLIP's and timm's own preprocessing is antialiased bicubic too, on the CPU.
            values = nn.functional.interpolate(
                values, size=self.reads.size, mode="bicubic", antialias=True
            ).clamp(0, 1)
        values = (values - self.mean) / self.std
        if values.device.type == "cpu":
            values = values.contiguous(memory_format=self.format)
        scores: Tensor = self.net(values)
        return scores


class Tower(nn.Module):
    """An image tower and a linear classifier; the tower's final norm and projection are in the head."""

    def __init__(self, tower: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Return class scores of normalised images."""
        scores: Tensor = self.head(self.tower(image))
        return scores


def build_image_classifier(
    section: ModelConfig, classes: int, seed: int, *, kept: int = 0, skeleton: bool = False
) -> ImageClassifier:
    """Build the model that `model.name` and `model.weights` name, with a new head.

    Parameters
    ----------
    section : ModelConfig
    classes : int
    seed : int
        The run's seed, which draws the head, and all weights if they are random.
    kept : int
        Side of the images that the model will get, if the user chose it. A network that takes any size
        computes at this size, unless `model.image-size` says otherwise.
    skeleton : bool
        Whether to build the layers without weights, on torch's `meta` device, and load nothing.

    Raises
    ------
    ConfigError
        If the library, the architecture or the weights are missing. The message says what to do.
    """
    build = {"layerfed": _shipped, "open_clip": _open_clip, "timm": _timm}[section.family]
    with new_weights(seed), torch.device("meta") if skeleton else nullcontext():
        net, reads = build(section, classes, "random" if skeleton else section.weights)
        if reads.any_size:
            reads = replace(reads, size=section.image_size or kept or reads.size)
        return ImageClassifier(net, reads)


Built = tuple[nn.Module, Preprocessing]


def _shipped(section: ModelConfig, classes: int, weights: str) -> Built:
    net = shipped_vit(classes)
    if weights == "embedded":
        file = shipped_file("model.weights = 'embedded'", "vit_cifar100.safetensors")
        missing, unexpected = net.load_state_dict(load_file(file), strict=False)
        if unexpected or any(not name.startswith("head.") for name in missing):
            raise RuntimeError(f"{file} does not fit: {missing} missing, {unexpected} too many")
    return net, Preprocessing(32, (0.5,) * 3, (0.5,) * 3)


def _timm(section: ModelConfig, classes: int, weights: str) -> Built:
    timm, data = require("timm", section.name), require("timm.data", section.name)

    name, path = section.architecture, Path(os.path.expanduser(section.weights))
    file = _weights_in(path) if path.is_dir() else path if path.is_file() else None
    options: dict[str, Any] = {
        "num_classes": classes,
        "pretrained": weights != "random" and file is None,
    }
    source = f"timm/{name}" if weights == "pretrained" else weights
    if section.weights not in ("pretrained", "random"):
        source = section.weights
        # A folder or repository has a configuration, which names the architecture.
        if path.is_file() and path.suffix not in FILES:
            raise ConfigError(
                f"model.weights = '{source}' should be a .safetensors file, or one of torch's: "
                f"{', '.join(FILES[1:])}"
            )
        if not path.is_file():
            kind = "local-dir" if path.is_dir() else "hf-hub"
            name = f"{kind}:{path if path.is_dir() else source}"
    if ":" not in name and not timm.is_model(name):
        raise ConfigError(
            f"model.name = '{section.name}': timm has no '{name}'"
            f"{nearest(name, timm.list_models()) or '; see timm.list_models()'}"
        )
    with loading(section, source), left_as_they_are() as missing:
        if section.image_size:
            with torch.device("meta"):
                shape = timm.create_model(name, **options | {"pretrained": False})
            if not _any_size(shape):
                options["img_size"] = section.image_size  # timm interpolates the positions
        net = timm.create_model(name, **options)
        # The weights' head is of other classes, unless there are as many as their configuration has, or
        # else the architecture's.
        heads = net.pretrained_cfg.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else heads
        if lacking := [name for name in missing if not lies_in(name, heads)]:
            raise ConfigError(
                f"'{source}' has no weights for {some(lacking)} of model.name = '{section.name}', which "
                "timm would leave at random; give weights of this architecture (model.weights)"
            )
        same = classes == net.pretrained_cfg["num_classes"]
        if not same and weights != "random":
            _draw(net, heads)
        if file is not None and weights != "random":
            convert = getattr(import_module(type(net).__module__), "checkpoint_filter_fn", None)
            load_weights(net, file, convert, () if same else heads)
    taken = data.resolve_model_data_config(net)
    return net, Preprocessing(
        size=options.get("img_size") or taken["input_size"][-1],
        mean=tuple(taken["mean"]),
        std=tuple(taken["std"]),
        interpolation=taken["interpolation"],
        crop=taken["crop_pct"],
        squash=taken["crop_mode"] == "squash",
        any_size=_any_size(net),
    )


def _draw(net: nn.Module, heads: Iterable[str]) -> None:
    """Draw a new head as `nn.Linear` does, by its inputs.

    timm draws some by their outputs, for a thousand classes. With seven, scores start far from 0, and a
    run spends its first rounds on unlearning them.
    """
    modules = dict(net.named_modules())
    for name in heads:
        if isinstance(head := modules.get(name), nn.Linear | nn.Conv2d):
            head.reset_parameters()


def _any_size(net: nn.Module) -> bool:
    """Return whether a network of timm takes images of any size."""
    config: dict[str, Any] = getattr(net, "pretrained_cfg", None) or {}
    # A configuration from elsewhere need not say it; timm's own of the architecture does.
    known = import_module("timm").get_pretrained_cfg(config.get("architecture", ""))
    return not (config.get("fixed_input_size") or known is None or known.fixed_input_size)


def _weights_in(folder: Path) -> Path | None:
    """Return the file of a folder that holds the weights: the hub's names first, safetensors first."""
    found = [file for suffix in FILES for file in sorted(folder.glob(f"*{suffix}"))]
    named = (file for file in found if file.stem in ("model", "pytorch_model"))
    return next(named, found[0] if found else None)


def clip_config(section: ModelConfig) -> dict[str, Any]:
    """Return open_clip's configuration of the architecture that a section names."""
    open_clip = require("open_clip", section.name)
    config: dict[str, Any] = open_clip.get_model_config(_clip_name(section))
    tag = open_clip.get_pretrained_cfg(section.architecture, section.weights)
    return config | ({"quick_gelu": True} if tag.get("quick_gelu") else {})


def _clip_name(section: ModelConfig) -> str:
    """Return the name by which open_clip finds an architecture's configuration."""
    path = Path(os.path.expanduser(section.weights))
    if path.is_dir():
        return f"local-dir:{path}"
    if "/" in section.weights and not path.is_file():
        return f"hf-hub:{section.weights}"
    return section.architecture


def _open_clip(section: ModelConfig, classes: int, weights: str) -> Built:
    open_clip = require("open_clip", section.name)
    name, asked = _clip_name(section), section.weights
    path, repository = Path(os.path.expanduser(asked)), None
    tags = open_clip.list_pretrained_tags_by_model(name)
    options: dict[str, Any] = {
        "load_weights": weights != "random",
        "require_pretrained": weights != "random",
        "weights_only": True,
        "force_image_size": section.image_size or None,
        "device": torch.get_default_device(),
    }
    if ":" in name:
        pass  # a folder or repository has its own configuration
    elif name not in open_clip.list_models():
        raise ConfigError(
            f"model.name = '{section.name}': open_clip has no '{name}'"
            f"{nearest(name, open_clip.list_models()) or '; see open_clip.list_models()'}"
        )
    elif path.is_file():
        options["pretrained"] = str(path) if weights != "random" else None
    elif asked in tags:
        tag = open_clip.get_pretrained_cfg(name, asked)
        options["pretrained"] = asked if weights != "random" else None
        # The tag knows with which of two activations the weights were trained.
        options["force_quick_gelu"] = bool(tag.get("quick_gelu"))
        repository = tag.get("hf_hub", "").rpartition("/")[0]
    elif asked != "random":
        raise ConfigError(
            f"model.weights = '{asked}' is no folder or file here, no hub id, and no weights that "
            f"open_clip has of {name}: {', '.join(tags)}; or say random"
        )
    with loading(section, asked, repository=repository):
        model = open_clip.create_model(name, **options)
    tower = model.visual
    if hasattr(tower, "output_tokens"):
        tower.output_tokens = False  # CoCa's tower would also return tokens for its text decoder
    settings = open_clip.get_model_preprocess_cfg(model)
    size = settings["size"] if isinstance(settings["size"], int) else settings["size"][-1]
    with torch.no_grad():
        width = tower.eval()(torch.zeros(1, 3, size, size)).shape[-1]
    return Tower(tower, width, classes), Preprocessing(
        size=size,
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        interpolation=settings["interpolation"],
        squash=settings["resize_mode"] == "squash",
        any_size=hasattr(tower, "trunk") and _any_size(tower.trunk),
    )
