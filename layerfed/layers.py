"""A model as an ordered list of layers: embeddings, blocks 0 … L-1, head.

Masks, budgets, costs, probes, messages, versions and plots are all per layer, so everything in this
package starts from a `LayerMap`. Embeddings are frozen, blocks are selectable, and the head is trained
by every client in every round [S, section V].
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Layer", "LayerMap", "LayerMapError", "digest", "fingerprint"]

EMBEDDINGS, HEAD = "embeddings", "head"

# What stands beside the blocks' container but is registered before the blocks and used after them, as
# open_clip's `proj`. Everything else before the blocks is an embedding.
LATE = {"proj", "ln_post", "logit_scale", "logit_bias", "head", "classifier", "lm_head"}


class LayerMapError(ValueError):
    """A model that cannot be split as asked; the message says what is in the way and what to do."""


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes
    ----------
    name : str
        `embeddings`, `blocks.0` … `blocks.{L-1}`, or `head`, whatever the model calls them.
    kind : {"embeddings", "block", "head"}
    parameters : tuple[str, ...]
        Names as in `model.named_parameters()`; a tied parameter stands under its first name only.
    buffers : tuple[str, ...]
        All buffers, persistent or not.
    tensors : tuple[str, ...]
        What travels: parameters and persistent buffers, by state-dict name.
    modules : tuple[str, ...]
        The outermost modules that lie wholly in this layer.
    elements : int
        Number of parameter elements.
    bytes : int
        Size of `tensors`.
    """

    name: str
    kind: Literal["embeddings", "block", "head"]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    tensors: tuple[str, ...]
    modules: tuple[str, ...]
    elements: int
    bytes: int


@dataclass(frozen=True)
class LayerMap:
    """How a model falls into layers.

    Attributes
    ----------
    layers : tuple[Layer, ...]
        Embeddings, the blocks in forward order, head.
    aliases : Mapping[str, str]
        Tied names, each with the name its tensor stands under.
    """

    layers: tuple[Layer, ...]
    aliases: Mapping[str, str]

    @classmethod
    def from_model(
        cls, model: nn.Module, *, blocks: str | None = None, head: Sequence[str] = ()
    ) -> LayerMap:
        """Split a model.

        The blocks are the longest run of same-class modules that follow each other, outermost first;
        parameters before them are embeddings, parameters after them the head.

        Parameters
        ----------
        model : nn.Module
        blocks : str, optional
            Names of the blocks instead, with `*` for one part of a name: `encoder.layer.*`, or several,
            separated by commas: `layer1.*, layer2.*`.
        head : Sequence[str]
            Name prefixes of more tensors that belong to the head.

        Raises
        ------
        LayerMapError
            If there are no blocks to be found, several candidates, or tensors that cannot be placed.
        """
        names = _matching(model, blocks) if blocks else _find_blocks(model)
        owner = _Placement(model, names, tuple(head))
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        layer_of = {name: owner.of_tensor(name) for name in tensors}
        _refuse_orphans(layer_of)
        aliases = _aliases(model)
        _refuse_shared_blocks(aliases, layer_of, owner)
        kept = set(model.state_dict(keep_vars=True))
        modules = _outermost(model, layer_of, owner)
        parameters = [name for name, _ in model.named_parameters()]
        buffers = [name for name, _ in model.named_buffers()]

        def layer(name: str, kind: Literal["embeddings", "block", "head"]) -> Layer:
            mine = tuple(n for n in parameters if layer_of[n] == name)
            also = tuple(n for n in buffers if layer_of[n] == name)
            travel = tuple(n for n in (*mine, *also) if n in kept)
            return Layer(
                name=name,
                kind=kind,
                parameters=mine,
                buffers=also,
                tensors=travel,
                modules=tuple(m for m, where in modules.items() if where == name),
                elements=sum(tensors[n].numel() for n in mine),
                bytes=sum(tensors[n].numel() * tensors[n].element_size() for n in travel),
            )

        found = (
            layer(EMBEDDINGS, "embeddings"),
            *(layer(name, "block") for name in owner.blocks.values()),
            layer(HEAD, "head"),
        )
        if not found[-1].parameters:
            raise LayerMapError(
                f"nothing follows the blocks ({names[0]} … {names[-1]}), so there is no head to "
                "train; name the blocks with a pattern (model.blocks) or the head (model.head)"
            )
        return cls(found, aliases)

    @property
    def embeddings(self) -> Layer:
        """What is never trained."""
        return self.layers[0]

    @property
    def blocks(self) -> tuple[Layer, ...]:
        """The selectable layers, input first."""
        return self.layers[1:-1]

    @property
    def head(self) -> Layer:
        """What everyone always trains."""
        return self.layers[-1]

    @property
    def num_blocks(self) -> int:
        """L, the number of selectable layers."""
        return len(self.layers) - 2

    def trained(self, mask: Sequence[bool]) -> list[str]:
        """Return the names of the layers that a mask of length L has a client train, head included."""
        chosen = [block.name for block, on in zip(self.blocks, mask, strict=True) if on]
        return [*chosen, self.head.name]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all layers, in order."""
        return tuple(layer.name for layer in self.layers)

    @cached_property
    def _by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def _by_tensor(self) -> dict[str, Layer]:
        return {
            name: layer for layer in self.layers for name in (*layer.parameters, *layer.buffers)
        }

    def __getitem__(self, name: str) -> Layer:
        """Return a layer by name."""
        return self._by_name[name]

    def layer_of(self, tensor: str) -> Layer:
        """Return the layer that a parameter or buffer belongs to; tied names are followed."""
        return self._by_tensor[self.aliases.get(tensor, tensor)]

    def check(self, model: nn.Module) -> None:
        """Make sure that a model has exactly the tensors of this map.

        Raises
        ------
        LayerMapError
            Naming the tensors that are missing or too many.
        """
        theirs = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        mine = set(self._by_tensor)
        if theirs != mine:
            raise LayerMapError(
                f"the model lacks {_some(mine - theirs)} and has {_some(theirs - mine)} besides"
            )


class _Placement:
    """Says which layer a tensor or module belongs to, by its name and its place in the model."""

    def __init__(self, model: nn.Module, blocks: Sequence[str], head: tuple[str, ...]) -> None:
        self.blocks = {module: f"blocks.{index}" for index, module in enumerate(blocks)}
        self.head = head
        order = [name for name, _ in _walk(model)]
        self._position = {name: index for index, name in enumerate(order)}
        self._first = self._position[blocks[0]]
        self._last = self._position[blocks[-1]]
        self._inert = {
            name
            for name, module in model.named_modules()
            if not any(True for _ in module.parameters()) and any(True for _ in module.buffers())
        }

    def of_tensor(self, name: str) -> str | None:
        """Return the layer's name, or None for a tensor that stands between the blocks."""
        inside = self.block_of(name)
        if inside:
            return inside
        if any(name == prefix or name.startswith(prefix + ".") for prefix in self.head):
            return HEAD
        owner = name.rpartition(".")[0]
        if owner in self._inert:
            # Rotary tables and the like: used by all blocks, trained by none.
            return EMBEDDINGS
        return self._around(name)

    def block_of(self, name: str) -> str | None:
        """Return the block that a name lies in."""
        parts = name.split(".")
        prefixes = (".".join(parts[: i + 1]) for i in range(len(parts)))
        return next((self.blocks[prefix] for prefix in prefixes if prefix in self.blocks), None)

    def _around(self, name: str) -> str | None:
        if self._is_late(name):
            return HEAD
        position = self._position[name]
        if position < self._first:
            return EMBEDDINGS
        return HEAD if position > self._last else None

    def _is_late(self, name: str) -> bool:
        parent = ""
        for part in name.split("."):
            beside_blocks = all(b.startswith(parent + ".") or not parent for b in self.blocks)
            if part in LATE and beside_blocks:
                return True
            parent = f"{parent}.{part}" if parent else part
        return False

    def of_module(self, name: str) -> str | None:
        """Return the layer of a module that has no tensors (dropout, activations)."""
        return self.block_of(name) or self._around(name)


def _walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield every module, parameter and buffer by name, in the order of registration."""
    for name, tensor in (*model._parameters.items(), *model._buffers.items()):
        if tensor is not None:
            yield prefix + name, tensor
    for name, child in model._modules.items():
        if child is not None:
            yield prefix + name, child
            yield from _walk(child, f"{prefix}{name}.")


def _find_blocks(model: nn.Module) -> list[str]:
    """Return the names of the longest run of same-class modules, outermost runs first."""
    outer: list[_Run] = []
    inner: list[_Run] = []
    for parent, module in model.named_modules():
        taken = {path for run in outer for path in run.paths}
        inside = any(parent == path or parent.startswith(path + ".") for path in taken)
        new = [run for run in _runs(parent, module) if not taken.issuperset(run.paths)]
        (inner if inside else outer).extend(new)
    # Three embeddings or projections beside each other are a run too, but never what is meant where
    # there are modules made of others.
    runs = [run for run in outer if run.composite] or outer
    if not runs:
        raise LayerMapError(
            "no blocks were found: no two modules of one class follow each other; name them with a "
            "pattern (model.blocks), as in 'encoder.layer.*'"
        )
    best = max(runs, key=lambda run: len(run.paths))
    # An encoder beside a decoder of its class, or stages that hold longer stacks than they are.
    rivals = [run for run in runs if run.kind == best.kind and run is not best]
    rivals += [run for run in inner if run.composite and len(run.paths) > len(best.paths)]
    if rivals:
        raise LayerMapError(
            f"several stacks could be the blocks ({best.paths[0]} …, {rivals[0].paths[0]} …); name "
            "them with a pattern (model.blocks), as in 'encoder.layer.*'"
        )
    return best.paths


@dataclass
class _Run:
    """Modules of one class that follow each other."""

    kind: str
    composite: bool
    paths: list[str]


def _runs(parent: str, module: nn.Module) -> list[_Run]:
    """Return the runs of two or more same-class modules among a module's children.

    A container of same-class modules stands for its members, so that the stages of a ResNet are one
    run; modules without parameters (activations) do not break a run.
    """
    # Path, module, and whether it stands in a container: an embedding beside a list of blocks of its
    # class is not one of them.
    members: list[tuple[str, nn.Module, bool]] = []
    for name, child in module.named_children():
        path = f"{parent}.{name}" if parent else name
        inner = list(child.named_children())
        if (
            isinstance(child, nn.Sequential | nn.ModuleList)
            and len({type(m) for _, m in inner}) == 1
        ):
            members += [(f"{path}.{n}", m, True) for n, m in inner]
        elif any(True for _ in child.parameters()):
            members.append((path, child, False))
    runs: list[_Run] = []
    last: tuple[type, bool] | None = None
    for path, member, contained in members:
        if last == (type(member), contained):
            runs[-1].paths.append(path)
        else:
            composite = any(True for _ in member.children())
            runs.append(_Run(type(member).__name__, composite, [path]))
        last = type(member), contained
    return [run for run in runs if len(run.paths) > 1]


def _matching(model: nn.Module, patterns: str) -> list[str]:
    """Return the modules that patterns name, in the order of registration."""
    wanted = [p.strip() for p in patterns.split(",") if p.strip()]
    rules = [
        re.compile(re.escape(p).replace(r"\*", "[^.]+").replace(r"\{\}", "[^.]+")) for p in wanted
    ]
    names = [name for name, _ in model.named_modules() if name]
    for pattern, rule in zip(wanted, rules, strict=True):
        if not any(rule.fullmatch(name) for name in names):
            near = ", ".join(names[:12])
            raise LayerMapError(
                f"model.blocks = '{pattern}' matches no module; modules begin with: {near}"
            )
    found = [name for name in names if any(rule.fullmatch(name) for rule in rules)]
    for name in found:
        nested = [other for other in found if other.startswith(name + ".")]
        if nested:
            raise LayerMapError(
                f"model.blocks = '{patterns}' matches {name} and {nested[0]} inside it"
            )
    return found


def _outermost(
    model: nn.Module, layer_of: Mapping[str, str | None], owner: _Placement
) -> dict[str, str]:
    """Return the outermost modules that lie wholly in one layer, each with that layer."""
    found: dict[str, str] = {}

    def visit(name: str, module: nn.Module) -> None:
        inside = {
            layer_of.get(f"{name}.{t}")
            for t, _ in (*module.named_parameters(), *module.named_buffers())
        } - {None}
        if len(inside) > 1 or name in {b.rpartition(".")[0] for b in owner.blocks}:
            for child, inner in module.named_children():
                visit(f"{name}.{child}", inner)
            return
        where = inside.pop() if inside else owner.of_module(name)
        if where is not None:
            found[name] = where

    for name, module in model.named_children():
        visit(name, module)
    return found


def _aliases(model: nn.Module) -> dict[str, str]:
    """Return the names that tied tensors go by besides their first."""
    first: dict[int, str] = {}
    aliases = {}
    walks: tuple[Callable[..., Iterator[tuple[str, Tensor]]], ...] = (
        model.named_parameters,
        model.named_buffers,
    )
    for walk in walks:
        for name, tensor in walk(remove_duplicate=False):
            canonical = first.setdefault(id(tensor), name)
            if canonical != name:
                aliases[name] = canonical
    return aliases


def _refuse_orphans(layer_of: Mapping[str, str | None]) -> None:
    orphans = {name for name, where in layer_of.items() if where is None}
    if orphans:
        raise LayerMapError(
            f"these tensors stand between the blocks and belong to none: {_some(orphans)}; name the "
            "blocks with a pattern that covers them (model.blocks), or add them to the head "
            "(model.head)"
        )


def _refuse_shared_blocks(
    aliases: Mapping[str, str], layer_of: Mapping[str, str | None], owner: _Placement
) -> None:
    for alias, canonical in aliases.items():
        here, there = owner.block_of(alias), layer_of[canonical]
        if here and here != there:
            raise LayerMapError(
                f"'{alias}' and '{canonical}' are one tensor in two layers ({here}, {there}); a layer "
                "that is used twice cannot be selected by halves: name blocks that share nothing "
                "(model.blocks)"
            )


def _some(names: set[str]) -> str:
    if not names:
        return "nothing"
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def digest(tensors: Mapping[str, np.ndarray | Tensor]) -> str:
    """Return the content digest of a layer: 32 hex digits over names, dtypes, shapes and bytes.

    The same for a torch tensor and a numpy array of equal content.
    """
    state = hashlib.blake2b(digest_size=16)
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            kind = str(value.dtype).removeprefix("torch.")
            # numpy has no bfloat16; its bits are as good.
            array = (value.view(torch.int16) if kind == "bfloat16" else value).numpy()
        else:
            array, kind = value, str(value.dtype)
        state.update(f"{name}:{kind}:{tuple(array.shape)};".encode())
        state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def fingerprint(digests: Mapping[str, str]) -> str:
    """Return the identity of a pretrained base: a digest of all its layers' digests."""
    text = "".join(f"{name}:{value};" for name, value in sorted(digests.items()))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
