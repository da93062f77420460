"""Image classifiers of three families, which map bytes to class scores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from layerfed.config import ConfigError, ModelConfig, nearest
from layerfed.models.block_finder import lies_in, some
from layerfed.models.source import FILES, loading, new_weights, require
from layerfed.models.weights import left_as_they_are, load_weights
from layerfed_assets import BACKBONE, backbone

__all__ = ["ImageClassifier", "Tower", "build_image_classifier"]


class ImageClassifier(nn.Module):
    """A network with the preprocessing of its training: input size, mean and deviation of colours.

    Parameters
    ----------
    net : nn.Module
        Maps normalised images (B, 3, size, size) to scores (B, classes).
    size : int
        Side of its input, in pixels.
    mean, std : Sequence[float]
        Mean and deviation of each colour, for values in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, net: nn.Module, size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        """Return class scores of images in bytes, shape (B, 3, S, S) with any S."""
        values = image.float() / 255
        if values.shape[-1] != self.size:
            # CLIP's and timm's own preprocessing is antialiased bicubic too, on the CPU.
            values = nn.functional.interpolate(
                values, size=self.size, mode="bicubic", antialias=True
            ).clamp(0, 1)
        scores: Tensor = self.net((values - self.mean) / self.std)
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
    section: ModelConfig, classes: int, seed: int, *, skeleton: bool = False
) -> ImageClassifier:
    """Build the model that `model.name` and `model.weights` name, with a new head.

    Parameters
    ----------
    section : ModelConfig
    classes : int
    seed : int
        The run's seed, which draws the head, and all weights if they are random.
    skeleton : bool
        Whether to build the layers without weights, on torch's `meta` device, and load nothing.

    Raises
    ------
    ConfigError
        If the library, the architecture or the weights are missing. The message says what to do.
    """
    build = {"layerfed": _shipped, "open_clip": _open_clip, "timm": _timm}[section.family]
    with new_weights(seed), torch.device("meta") if skeleton else nullcontext():
        net, size, mean, std = build(section, classes, "random" if skeleton else section.weights)
        return ImageClassifier(net, size, mean, std)


Built = tuple[nn.Module, int, Sequence[float], Sequence[float]]


def _shipped(section: ModelConfig, classes: int, weights: str) -> Built:
    net = backbone(num_classes=classes)
    if weights == "embedded":
        missing, unexpected = net.load_state_dict(load_file(BACKBONE), strict=False)
        if unexpected or any(not name.startswith("head.") for name in missing):
            raise RuntimeError(f"{BACKBONE} does not fit: {missing} missing, {unexpected} too many")
    return net, 32, (0.5,) * 3, (0.5,) * 3


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
            name = f"{kind}:{source}"
    if ":" not in name and not timm.is_model(name):
        raise ConfigError(
            f"model.name = '{section.name}': timm has no '{name}'"
            f"{nearest(name, timm.list_models()) or '; see timm.list_models()'}"
        )
    with loading(section, source), left_as_they_are() as missing:
        net = timm.create_model(name, **options)
        # A file's head is of other classes, unless there are as many as its configuration has, or else
        # the architecture's.
        heads = net.pretrained_cfg.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else heads
        if lacking := [name for name in missing if not lies_in(name, heads)]:
            raise ConfigError(
                f"'{source}' has no weights for {some(lacking)} of model.name = '{section.name}', which "
                "timm would leave at random; give weights of this architecture (model.weights)"
            )
        if file is not None and weights != "random":
            same = classes == net.pretrained_cfg["num_classes"]
            convert = getattr(import_module(type(net).__module__), "checkpoint_filter_fn", None)
            load_weights(net, file, convert, () if same else heads)
    taken = data.resolve_model_data_config(net)
    return net, taken["input_size"][-1], taken["mean"], taken["std"]


def _weights_in(folder: Path) -> Path | None:
    """Return the file of a folder that holds the weights: the hub's names first, safetensors first."""
    found = [file for suffix in FILES for file in sorted(folder.glob(f"*{suffix}"))]
    named = (file for file in found if file.stem in ("model", "pytorch_model"))
    return next(named, found[0] if found else None)


def _open_clip(section: ModelConfig, classes: int, weights: str) -> Built:
    open_clip = require("open_clip", section.name)
    name, asked = section.architecture, section.weights
    path, repository = Path(os.path.expanduser(asked)), None
    tags = open_clip.list_pretrained_tags_by_model(name)
    options: dict[str, Any] = {
        "load_weights": weights != "random",
        "require_pretrained": weights != "random",
        "weights_only": True,
        "device": torch.get_default_device(),
    }
    if path.is_dir():
        name = f"local-dir:{path}"
    elif "/" in asked and not path.is_file():
        name = f"hf-hub:{asked}"
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
    return Tower(tower, width, classes), size, settings["mean"], settings["std"]
