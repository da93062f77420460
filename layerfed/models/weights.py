"""Weights of one's own: files of weights, weights in half precision, and weights that are not finite."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import INFO, WARNING
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from flwr.common.logger import log
from torch import Tensor, nn

from layerfed.config import ConfigError
from layerfed.models.block_finder import some
from layerfed.models.stored import HALF, owners, put, stored

__all__ = [
    "Files",
    "files_of",
    "half_as_stored",
    "in_float32",
    "left_as_they_are",
    "load_weights",
    "matched",
    "note_files",
    "read_weights",
    "refuse_not_finite",
]

# Where trainers keep a model's weights in a checkpoint, the smoothed ones first.
INSIDE = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "module", "net")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a `.safetensors` file or of a checkpoint of torch's, of which no code runs."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    found = torch.load(path, map_location="cpu", weights_only=True)
    while isinstance(found, Mapping):
        inner = next((found[k] for k in INSIDE if isinstance(found.get(k), Mapping)), None)
        if inner is None:
            break
        found = inner
    tensors = {}
    if isinstance(found, Mapping):
        tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ConfigError(f"model.weights = '{path}' holds no tensors by name")
    return tensors


def matched(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], *, in_order: bool
) -> tuple[dict[str, Tensor], str] | None:
    """Give a file's tensors the names that a model has for them.

    Parameters
    ----------
    tensors : Mapping[str, Tensor]
    shapes : Mapping[str, torch.Size]
        The shapes that are needed, by the model's names.
    in_order : bool
        Whether the file keeps the order in which its model registered them.

    Returns
    -------
    tuple[dict[str, Tensor], str] | None
        All tensors that are needed, and what had to be done to their names; None if they do not fit.
    """
    first = next(iter(shapes))
    prefixes = {name.removesuffix(first) for name in tensors if name.endswith(first)}
    for prefix in sorted(prefixes, key=len):
        found = {name: tensors.get(prefix + name) for name in shapes}
        taken = {n: t for n, t in found.items() if t is not None and t.shape == shapes[n]}
        if len(taken) == len(shapes):
            return taken, f"without their prefix '{prefix}'" if prefix else ""
    values = list(tensors.values())[: len(shapes)]
    if in_order and [value.shape for value in values] == list(shapes.values()):
        return dict(zip(shapes, values, strict=True)), f"in the file's order, '{first}' first"
    return None


def load_weights(model: nn.Module, path: Path, convert: object, heads: Collection[str]) -> None:
    """Load a file's weights into a model, but for its head.

    Parameters
    ----------
    model : nn.Module
    path : Path
    convert : Callable | None
        What the model's library has to convert other names or shapes: f(tensors, model).
    heads : Collection[str]
        Modules that stay as they are.

    Raises
    ------
    ConfigError
        If the file lacks weights of the model, which would silently be random.
    """
    tensors, state = read_weights(path), model.state_dict()
    new = tuple(f"{head}." for head in heads)
    shapes = {name: tensor.shape for name, tensor in state.items() if not name.startswith(new)}
    in_order = path.suffix != ".safetensors"  # which sorts them
    found = matched(tensors, shapes, in_order=in_order)
    if found is None and callable(convert):
        found = matched(convert(dict(tensors), model), shapes, in_order=in_order)
    if found is None:
        lacking = [n for n, s in shapes.items() if n not in tensors or tensors[n].shape != s]
        raise ConfigError(
            f"model.weights = '{path}' has no weights of the right size for {some(lacking)}; its "
            f"first tensors are {some(list(tensors))}"
        )
    taken, how = found
    if how:
        log(WARNING, "model.weights = '%s': %d tensors are taken %s", path, len(taken), how)
    model.load_state_dict(taken, strict=False)


@contextmanager
def left_as_they_are() -> Iterator[list[str]]:
    """Collect the tensors that a library's own loading in this context leaves at random."""
    names: list[str] = []
    load = nn.Module.load_state_dict

    def noted(model: nn.Module, *given: Any, **named: Any) -> Any:
        keys = load(model, *given, **named)
        names.extend(keys.missing_keys)
        return keys

    nn.Module.load_state_dict = noted  # type: ignore[method-assign, assignment]
    try:
        yield names
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]


def refuse_untrainable(model: nn.Module) -> None:
    """Refuse tensors of a type that torch can neither train nor convert as it is, such as float8.

    Raises
    ------
    ConfigError
        Naming the tensors.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    known = (*HALF, torch.float32, torch.float64)
    odd = [n for n, t in tensors.items() if t.dtype.is_floating_point and t.dtype not in known]
    if odd:
        raise ConfigError(
            f"{some(odd)} of the model are in {tensors[odd[0]].dtype}, which cannot be trained; give "
            "weights in float32, bfloat16 or float16"
        )


def in_float32(model: nn.Module) -> nn.Module:
    """Return the model with what is in half precision in float32.

    Raises
    ------
    ConfigError
        As `refuse_untrainable`.
    """
    refuse_untrainable(model)
    return model._apply(lambda t: t.float() if t.dtype in HALF else t)  # type: ignore[no-untyped-call, no-any-return]


def half_as_stored(model: nn.Module) -> nn.Module:
    """Return the model with its parameters in half precision as they are, cast as they are used.

    Raises
    ------
    ConfigError
        As `refuse_untrainable`.
    """
    refuse_untrainable(model)
    parameters, types = dict(model.named_parameters()), set()
    for name, places in owners(model).items():
        module, attribute = places[0]
        tensor = getattr(module, attribute).detach()
        if tensor.dtype in HALF:
            put(places, stored(tensor) if name in parameters else tensor.float())
            types.add(str(tensor.dtype).removeprefix("torch."))
    if types:
        log(INFO, "frozen layers stay in %s; trained ones are in float32", " and ".join(types))
    return model


@dataclass(frozen=True)
class Files:
    """The files that a model's weights were mapped from.

    Attributes
    ----------
    paths : tuple[Path, ...]
    drawn : frozenset[str]
        Tensors that are not in them, such as those of the new head.
    """

    paths: tuple[Path, ...]
    drawn: frozenset[str]


_FILES: WeakKeyDictionary[nn.Module, Files] = WeakKeyDictionary()


def note_files(model: nn.Module, files: Files) -> None:
    """Note that a model's tensors are views of mapped files."""
    _FILES[model] = files


def files_of(model: nn.Module) -> Files | None:
    """Return the files that a model's tensors are views of, if they are."""
    return _FILES.get(model)


def refuse_not_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that hold NaN or infinity, which no training mends.

    Raises
    ------
    ConfigError
        Naming the tensors.
    """
    spoilt = []
    for name, tensor in tensors.items():
        if tensor.dtype.is_floating_point and tensor.numel() and not tensor.is_meta:
            low, high = tensor.detach().aminmax()  # makes no copy, and NaN comes through
            if not torch.isfinite(low) or not torch.isfinite(high):
                spoilt.append(name)
    if spoilt:
        raise ConfigError(f"the model's weights hold NaN or Inf in {some(spoilt)}")
