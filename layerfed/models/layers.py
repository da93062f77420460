"""A model as an ordered list of layers: embeddings, blocks 0 … L-1, head.

Masks, budgets, costs, probes, messages, versions and plots are all per layer, so everything in this
package starts from a `LayerMap`. Embeddings are frozen, blocks are selectable, and every client trains
the head in every round [S, section V].
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from layerfed.models.block_finder import (
    LayerMapError,
    are_convolutions,
    find_blocks,
    lies_in,
    match_blocks,
    match_tensors,
    refuse_lazy,
    refuse_left_over,
    refuse_no_head,
    some,
)
from layerfed.models.trace import Forward, Trace, Uses, trace
from layerfed.models.units import BLOCKS, Units, find_units

__all__ = [
    "Layer",
    "LayerMap",
    "LayerMapError",
    "adapted_weight",
    "factor_pairs",
    "layer_costs",
    "of_ranks",
    "traced",
]

EMBEDDINGS, HEAD = "embeddings", "head"
# As PEFT calls the two factors of its adapter.
FACTOR_A, FACTOR_B, ADAPTED = ".lora_A.default.", ".lora_B.default.", ".base_layer."

# Tensors that are registered before the blocks but used after them, such as open_clip's `proj`. All
# other tensors before the blocks are embeddings.
LATE = {"proj", "ln_post", "logit_scale", "logit_bias", "head", "classifier", "lm_head"}


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes
    ----------
    name : str
        `embeddings`, `blocks.0` … `blocks.{L-1}`, or `head`, whatever the names in the model.
    kind : {"embeddings", "block", "head"}
    parameters : tuple[str, ...]
        Names as in `model.named_parameters()`; a tied parameter has its first name only.
    buffers : tuple[str, ...]
        All buffers, persistent or not.
    tensors : tuple[str, ...]
        State-dict names of the parameters and persistent buffers, which are sent and averaged.
    modules : tuple[str, ...]
        The outermost modules that lie entirely in this layer.
    elements : int
        Number of elements of the parameters, those that clients keep included.
    bytes : int
        Size of `tensors`.
    frozen : tuple[str, ...]
        Those of `tensors` that clients get, and neither train nor send: weights that the server changes.
    sent_bytes : int
        Size of the others.
    own : tuple[str, ...]
        Parameters that each client trains with the layer, keeps and never sends: those of a second
        adapter. They are not among `parameters` and `tensors`, and nobody else has them.
    trained_bytes : int
        Size of all that a client trains of the layer.
    """

    name: str
    kind: Literal["embeddings", "block", "head"]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    tensors: tuple[str, ...]
    modules: tuple[str, ...]
    elements: int
    bytes: int
    frozen: tuple[str, ...]
    sent_bytes: int
    own: tuple[str, ...]
    trained_bytes: int

    @cached_property
    def trained(self) -> tuple[str, ...]:
        """The parameters that clients train, those that they keep included."""
        return (*self.parameters, *self.own)

    @cached_property
    def sent(self) -> tuple[str, ...]:
        """The tensors whose updates clients send."""
        return tuple(name for name in self.tensors if name not in self.frozen)


@dataclass(frozen=True)
class LayerMap:
    """The split of a model into layers.

    Attributes
    ----------
    layers : tuple[Layer, ...]
        Embeddings, the blocks in forward order, head.
    aliases : Mapping[str, str]
        Further names of tied tensors, each with the tensor's first name.
    shapes : Mapping[str, tuple[int, ...]]
        Shapes of all parameters and buffers.
    adapted : bool
        Whether the blocks are adapters. Everything that they adapt is in the embeddings then, which no
        client trains and no message carries.
    personal : frozenset[str]
        Layers that each client keeps to itself: it trains them like the others, and sends none.
    skippable : Mapping[str, str]
        The blocks without which the network runs too, each with its module: residual blocks whose output
        has the shape and type of their input. Known only if the model was traced, and of whole blocks.
    """

    layers: tuple[Layer, ...]
    aliases: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    adapted: bool = False
    personal: frozenset[str] = frozenset()
    skippable: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        blocks: str | None = None,
        head: str | Sequence[str] = (),
        embeddings: str | Sequence[str] = (),
        units: str = BLOCKS,
        forward: Forward | None = None,
    ) -> LayerMap:
        """Split a model.

        The blocks are the members of the outermost list of composite modules, or consecutive siblings of
        one class (see `block_finder`). With `forward`, every other tensor goes by its use: a tensor that
        several blocks or the first block use is an embedding, one that is used after the last block is
        in the head, and one between two blocks, such as a downsampler, is in the block after it. Without
        `forward`, tensors registered before the blocks are embeddings, and those after them are the
        head. A tied parameter in both is an embedding.

        Parameters
        ----------
        model : nn.Module
        blocks : str, optional
            Patterns for the blocks' names, separated by commas, with `*` for one part of a name:
            `encoder.layer.*`, or `layer1.*, layer2.*`. If only some modules of a stack are blocks, those
            before them are embeddings, and those after them must be named in the head.
        head, embeddings : str or Sequence[str]
            Names or patterns of more modules or tensors that belong to the head or to the embeddings.
        units : str
            The parts of a block that are selected: whole `blocks`, `attention-mlp`, or patterns of
            modules inside the blocks. Each part is then a layer `blocks.N` of its own (see `units`).
        forward : Callable[[nn.Module], object], optional
            Runs the model on an example and returns its scores.

        Raises
        ------
        LayerMapError
            If there are no blocks or several candidates, if a tensor belongs to no layer, if a name does
            not exist, if parameters are not initialised yet, or if backward from a layer would reach
            the layers below it.
        """
        refuse_lazy(model)
        in_head = match_tensors(model, head, "model.head")
        frozen = match_tensors(model, embeddings, "model.embeddings")
        apart = [*in_head, *frozen]
        seen = None if forward is None else traced(model, forward)
        names = match_blocks(model, blocks) if blocks else find_blocks(model, apart, seen)
        names = [name for name in names if not lies_in(name, apart)]
        if not names:
            keys = {"model.head": in_head, "model.embeddings": frozen}
            given = " with ".join(f"{key} = '{', '.join(n)}'" for key, n in keys.items() if n)
            raise LayerMapError(f"{given} leaves no blocks to select")
        if seen is None:
            owner = _Placement(model, names, in_head, frozen)
        else:
            names = _in_order_of_use(names, seen)
            owner = _ByUse(model, names, in_head, frozen, seen.uses(names))
        layer_of, aliases = _place(model, owner)
        if blocks or seen is None:
            refuse_left_over(model, names, apart, seen)
        parts = find_units(model, names, units, None if seen is None else seen.order)
        whole = layer_of
        layer_of = {name: parts.layer(name, place) for name, place in whole.items()}
        modules = _outermost(model, layer_of, owner, parts)
        layers = _layers(model, layer_of, modules, len(parts.names))
        if not layers[-1].parameters:
            refuse_no_head(names)
        for layer, name in zip(layers[1:], parts.names, strict=False):
            if not layer.parameters:
                raise LayerMapError(
                    f"{name} has no tensors of its own, so it cannot be a block; name others "
                    "(model.blocks)"
                )
        if seen is not None and isinstance(owner, _ByUse):
            refuse_reaching_down(names, owner.uses, whole)
            if units != BLOCKS:
                refuse_reaching_down(parts.names, seen.uses(parts.names), layer_of)
        skippable = {
            f"blocks.{index}": name
            for index, name in enumerate(names)
            if units == BLOCKS and seen is not None and seen.can_be_skipped(name)
        }
        return cls(layers, aliases, _shapes(model), skippable=skippable)

    def with_adapters(
        self,
        model: nn.Module,
        adapters: Mapping[str, str],
        weights: Mapping[str, str],
        own: Collection[str] = (),
    ) -> LayerMap:
        """Return the split of the same model once it has adapters.

        Parameters
        ----------
        model : nn.Module
            The model that this map splits, with adapters in its blocks.
        adapters : Mapping[str, str]
            Names of the adapters' parameters, each with the name of its block.
        weights : Mapping[str, str]
            The same of the weights that the server folds adapters into.
        own : Collection[str]
            Those of the adapters' parameters that each client keeps to itself.
        """
        head = {*self.head.parameters, *self.head.buffers}
        rest = {name: HEAD if name in head else EMBEDDINGS for name in _tensors(model)}
        modules = {module: layer.name for layer in self.layers for module in layer.modules}
        places = {**rest, **adapters, **weights}
        layers = _layers(model, places, modules, self.num_blocks, weights, own)
        shapes = _shapes(model)
        return LayerMap(layers, _aliases(_tied(model)), shapes, True, self.personal, self.skippable)

    def keeping(self, personal: str) -> LayerMap:
        """Return the same split with some layers personal.

        Parameters
        ----------
        personal : str
            Names of layers, separated by commas, with `*` for any text: `head, blocks.1*`.

        Raises
        ------
        LayerMapError
            If a pattern matches no layer that clients train, or nothing is left to share.
        """
        trained = [layer.name for layer in self.layers[1:]]
        found: set[str] = set()
        for pattern in (part.strip() for part in personal.split(",") if part.strip()):
            names = fnmatch.filter(trained, pattern)
            if not names:
                raise LayerMapError(
                    f"model.personal = '{pattern}' names no layer that clients train: there are "
                    f"blocks.0 to {trained[-2]} and head"
                )
            found.update(names)
        if len(found) == len(trained):
            raise LayerMapError(f"model.personal = '{personal}' leaves no layer that is shared")
        return replace(self, personal=frozenset(found))

    def with_frozen_statistics(self, model: nn.Module) -> LayerMap:
        """Return this split with BatchNorm's statistics among the embeddings, so they stay as they are.

        The probe measures the model as it is evaluated. With statistics of the batch, a block in
        training is another function: its loss falls along another gradient, and its new statistics do
        not fit the blocks around it, at any learning rate.
        """
        frozen = {
            f"{name}.{buffer}"
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm)
            for buffer, _ in module.named_buffers(recurse=False)
        }
        if not frozen:
            return self
        places = {n: EMBEDDINGS if n in frozen else self.layer_of(n).name for n in _tensors(model)}
        modules = {module: layer.name for layer in self.layers for module in layer.modules}
        return replace(self, layers=_layers(model, places, modules, self.num_blocks))

    @property
    def embeddings(self) -> Layer:
        """The layer that no client trains."""
        return self.layers[0]

    @property
    def blocks(self) -> tuple[Layer, ...]:
        """The selectable layers, input first."""
        return self.layers[1:-1]

    @property
    def head(self) -> Layer:
        """The layer that every client trains in every round."""
        return self.layers[-1]

    @property
    def num_blocks(self) -> int:
        """L, the number of selectable layers."""
        return len(self.layers) - 2

    @property
    def rank(self) -> int:
        """r, the rank of the adapters; 1 if the model has none."""
        return next((shape[0] for name, shape in self.shapes.items() if FACTOR_A in name), 1)

    @property
    def storable(self) -> tuple[Layer, ...]:
        """The layers that may be held in less than float32 while they are frozen.

        The head is trained in every round, and adapters are small and begin at random values.
        """
        return self.layers[:1] if self.adapted else self.layers[:-1]

    def trained(self, mask: Sequence[bool]) -> list[str]:
        """Return the names of the layers that a client with this mask trains, head included."""
        chosen = [block.name for block, on in zip(self.blocks, mask, strict=True) if on]
        return [*chosen, self.head.name]

    def own(self, layer: str) -> tuple[str, ...]:
        """Return the tensors of a layer that each client keeps to itself."""
        found = self[layer]
        return (*found.tensors, *found.own) if layer in self.personal else found.own

    @cached_property
    def kept(self) -> frozenset[str]:
        """The tensors that each client keeps to itself, of all layers."""
        return frozenset(tensor for layer in self.names for tensor in self.own(layer))

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
            name: layer
            for layer in self.layers
            for name in (*layer.trained, *layer.frozen, *layer.buffers)
        }

    def __getitem__(self, name: str) -> Layer:
        """Return a layer by name."""
        return self._by_name[name]

    def layer_of(self, tensor: str) -> Layer:
        """Return the layer that a parameter or buffer belongs to; tied names are followed."""
        return self._by_tensor[self.aliases.get(tensor, tensor)]

    def check(self, model: nn.Module) -> None:
        """Refuse a model that does not have exactly the tensors of this map, in the same shapes.

        Raises
        ------
        LayerMapError
            If tensors are missing, too many, or of other shapes. The message names them.
        """
        theirs = _shapes(model)
        if theirs.keys() != self.shapes.keys():
            lacks = sorted(self.shapes.keys() - theirs.keys())
            besides = sorted(theirs.keys() - self.shapes.keys())
            raise LayerMapError(f"the model lacks {some(lacks)} and has {some(besides)} besides")
        other = [
            f"{name} {shape} instead of {self.shapes[name]}"
            for name, shape in theirs.items()
            if shape != self.shapes[name]
        ]
        if other:
            raise LayerMapError(f"the model has other shapes: {some(other)}")


class _Placement:
    """The rule that gives each tensor and module of a model its layer."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        head: Sequence[str],
        embeddings: Sequence[str],
    ) -> None:
        modules = dict(model.named_modules())
        block = {id(modules[name]): f"blocks.{index}" for index, name in enumerate(blocks)}
        # A block that is used more than once counts as one block under all its names.
        self.blocks = {
            name: block[id(module)]
            for name, module in model.named_modules(remove_duplicate=False)
            if id(module) in block
        }
        self.head = head
        self.embeddings = embeddings
        self._position = {name: index for index, (name, _) in enumerate(_walk(model))}
        self._first = min(self._position[name] for name in self.blocks)
        self._last = max(self._position[name] for name in self.blocks)
        self._inert = {
            name
            for name, module in modules.items()
            if not any(True for _ in module.parameters()) and any(True for _ in module.buffers())
        }

    def of_tensor(self, name: str) -> str | None:
        """Return the name of a tensor's layer, or None for a tensor between the blocks."""
        if lies_in(name, self.head):
            return HEAD
        if lies_in(name, self.embeddings):
            return EMBEDDINGS
        inside = self.block_of(name)
        if inside:
            return inside
        owner = name.rpartition(".")[0]
        if owner in self._inert:
            # These are rotary tables and the like, which all blocks use and none trains.
            return EMBEDDINGS
        return self._around(name)

    def block_of(self, name: str) -> str | None:
        """Return the block that contains a name, or None."""
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
        return HEAD if lies_in(name, self.head) else self.block_of(name) or self._around(name)

    def of_tied(self, names: Sequence[str]) -> str | None:
        """Return the layer of a tensor with several names.

        Raises
        ------
        LayerMapError
            If it is in a block and in another layer.
        """
        places = [self.of_tensor(name) for name in names]
        if set(self.blocks.values()).intersection(places) and len(set(places)) > 1:
            other = next(i for i, place in enumerate(places) if place != places[0])
            raise LayerMapError(
                f"'{names[other]}' and '{names[0]}' are one tensor in two layers ({places[other]}, "
                f"{places[0]}); a layer that is used twice cannot be selected by halves: name blocks "
                "that share nothing (model.blocks)"
            )
        # Embeddings that are tied with the head stay frozen.
        return EMBEDDINGS if EMBEDDINGS in places else next(filter(None, places), None)


class _ByUse(_Placement):
    """The rule by use: what backward reaches from the blocks and from the result.

    Parameters
    ----------
    model : nn.Module
    blocks, head, embeddings : Sequence[str]
    uses : Uses
        How the blocks use the model's tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        head: Sequence[str],
        embeddings: Sequence[str],
        uses: Uses,
    ) -> None:
        super().__init__(model, blocks, head, embeddings)
        self._names = blocks
        self.uses = uses
        self._model = model
        self._tables = {
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        }
        self._convolutions = are_convolutions(model, blocks)
        first = {parameter: name for name, parameter in model.named_parameters()}
        self._first_names = {
            name: first[parameter]
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }

    def of_tensor(self, name: str) -> str:
        """Return the name of a tensor's layer."""
        if lies_in(name, self.head):
            return HEAD
        if lies_in(name, self.embeddings):
            return EMBEDDINGS
        if name not in self._first_names:
            return self.block_of(name) or self._of_buffer(name)
        return self._of_parameter(name)

    def _of_parameter(self, name: str) -> str:
        first = self._first_names[name]
        users = [i for i, reach in enumerate(self.uses.reach) if first in reach.tensors]
        inside = self.block_of(name)
        if inside:
            several = first in self.uses.handed_on and len(users) > 1
            return EMBEDDINGS if several else inside
        if users == [len(self._names)]:
            return HEAD
        shared = len(users) > 1 and first not in self.uses.once
        if not users or users[0] == 0 or shared or name in self._tables:
            return EMBEDDINGS
        # The norm of a convolution follows it; what else lies between blocks leads to the next one.
        return f"blocks.{users[0] - self._convolutions}"

    def _of_buffer(self, name: str) -> str:
        """Return the layer of the parameters around a buffer, if it is one layer."""
        while name:
            name = name.rpartition(".")[0]
            module = self._model.get_submodule(name)
            prefix = f"{name}." if name else ""
            around = {self.of_tensor(prefix + n) for n, _ in module.named_parameters()}
            if around:
                return around.pop() if len(around) == 1 else EMBEDDINGS
        return EMBEDDINGS

    def of_tied(self, names: Sequence[str]) -> str:
        """Return the layer of a tensor with several names: embeddings, if the names disagree."""
        places = {self.of_tensor(name) for name in names}
        return places.pop() if len(places) == 1 else EMBEDDINGS


def refuse_reaching_down(names: Sequence[str], uses: Uses, layer_of: Mapping[str, str]) -> None:
    """Refuse a split in which a step on a layer reaches a layer below it.

    Parameters
    ----------
    names : Sequence[str]
        The blocks, or the cores of their units, input first.
    uses : Uses
    layer_of : Mapping[str, str]
        The layer of each tensor.

    Raises
    ------
    LayerMapError
        If a block's output depends on the head or on a block above it.
    """
    for index, reach in enumerate(uses.reach[:-1]):
        below = {EMBEDDINGS, *(f"blocks.{i}" for i in range(index + 1))}
        above = [name for name in sorted(reach.tensors) if layer_of[name] not in below]
        above += [names[other] for other in reach.blocks if other > index]
        if above:
            raise LayerMapError(
                f"{names[index]} depends on {some(above)}, of a layer above it, so that a step there "
                "would run back through this block; leave it out of model.head, or name other blocks "
                "(model.blocks)"
            )


def traced(model: nn.Module, forward: Forward) -> Trace:
    """Return a trace of the model.

    Raises
    ------
    LayerMapError
        If the model cannot run.
    """
    try:
        return trace(model, forward)
    except Exception as error:  # a model may raise anything
        if any(parameter.is_meta for parameter in model.parameters()):
            # Some operations need values, as those that send tokens to experts do.
            return traced(_of_zeros(model), forward)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise LayerMapError(
            f"the model cannot score an example, so the use of its layers is unknown: {reason}; choose "
            "another model, or sizes that fit it (model.name, task.max-tokens, task.image-size)"
        ) from error


def _of_zeros(model: nn.Module) -> nn.Module:
    """Return a copy of a skeleton on the CPU, of zeros, which take memory once they are written to."""

    def zeros(tensor: Tensor) -> Tensor:
        memory = torch.from_numpy(np.zeros(tensor.numel() * tensor.element_size(), dtype=np.uint8))
        return memory.view(tensor.dtype).view(tensor.shape)

    tensors: dict[int, Tensor] = {id(b): zeros(b) for b in model.buffers()}
    tensors |= {id(p): nn.Parameter(zeros(p), p.requires_grad) for p in model.parameters()}
    return deepcopy(model, tensors)


def _in_order_of_use(blocks: Sequence[str], seen: Trace) -> list[str]:
    """Return the blocks in the order in which the pass entered them.

    Raises
    ------
    LayerMapError
        If the pass did not call a block.
    """
    unused = [name for name in blocks if name not in seen.calls]
    if unused:
        raise LayerMapError(
            f"{some(unused)} would be blocks, but the model does not call them for an example; name "
            "modules that it calls (model.blocks)"
        )
    return sorted(blocks, key=seen.order.__getitem__)


def _walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield every module, parameter and buffer by name, in the order of registration."""
    for name, tensor in (*model._parameters.items(), *model._buffers.items()):
        if tensor is not None:
            yield prefix + name, tensor
    for name, child in model._modules.items():
        if child is not None:
            yield prefix + name, child
            yield from _walk(child, f"{prefix}{name}.")


def _outermost(
    model: nn.Module, layer_of: Mapping[str, str | None], owner: _Placement, units: Units
) -> dict[str, str]:
    """Return the outermost modules that lie entirely in one layer, each with that layer."""
    found: dict[str, str] = {}

    def visit(name: str, module: nn.Module) -> None:
        inside = {
            layer_of.get(f"{name}.{t}")
            for t, _ in (*module.named_parameters(), *module.named_buffers())
        } - {None}
        if len(inside) > 1 or any(block.startswith(name + ".") for block in owner.blocks):
            for child, inner in module.named_children():
                visit(f"{name}.{child}", inner)
            return
        if inside:
            found[name] = str(inside.pop())
        elif (where := owner.of_module(name)) is not None:
            found[name] = units.layer(name, where)

    for name, module in model.named_children():
        visit(name, module)
    return found


def _place(model: nn.Module, owner: _Placement) -> tuple[dict[str, str], dict[str, str]]:
    """Return the layer of every tensor, and the further names of tied tensors."""
    groups = _tied(model)
    layer_of: dict[str, str] = {}
    orphans = []
    for names in groups:
        place = owner.of_tied(names)
        if place is None:
            orphans.append(names[0])
        else:
            layer_of[names[0]] = place
    if orphans:
        raise LayerMapError(
            "these tensors stand between the blocks and belong to none: "
            f"{some(sorted(orphans))}; name the blocks with a pattern that covers them "
            "(model.blocks), or add them to the head (model.head)"
        )
    return layer_of, _aliases(groups)


def _tied(model: nn.Module) -> list[list[str]]:
    """Return all names of each tensor."""
    groups: dict[int, list[str]] = {}
    for name, tensor in _tensors(model, tied=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _aliases(groups: Sequence[Sequence[str]]) -> dict[str, str]:
    return {name: first for first, *others in groups for name in others}


def _layers(
    model: nn.Module,
    layer_of: Mapping[str, str],
    modules: Mapping[str, str],
    num_blocks: int,
    frozen: Collection[str] = (),
    own: Collection[str] = (),
) -> tuple[Layer, ...]:
    """Return the layers in order, each with its tensors and modules."""
    tensors = _tensors(model)
    kept = set(model.state_dict(keep_vars=True))
    parameters = [name for name, _ in model.named_parameters()]
    buffers = [name for name, _ in model.named_buffers()]

    def layer(name: str, kind: Literal["embeddings", "block", "head"]) -> Layer:
        all_mine = [n for n in parameters if layer_of[n] == name]
        mine = tuple(n for n in all_mine if n not in frozen and n not in own)
        rest = tuple(n for n in all_mine if n in frozen)
        stay = tuple(n for n in all_mine if n in own)
        also = tuple(n for n in buffers if layer_of[n] == name)
        travel = tuple(n for n in (*mine, *rest, *also) if n in kept)
        size = {n: tensors[n].numel() * tensors[n].element_size() for n in (*travel, *stay)}
        sent_bytes = sum(size[n] for n in travel if n not in frozen)
        return Layer(
            name=name,
            kind=kind,
            parameters=mine,
            buffers=also,
            tensors=travel,
            modules=tuple(m for m, where in modules.items() if where == name),
            elements=sum(tensors[n].numel() for n in (*mine, *stay)),
            bytes=sum(size[n] for n in travel),
            frozen=rest,
            sent_bytes=sent_bytes,
            own=stay,
            trained_bytes=sent_bytes + sum(size[n] for n in stay),
        )

    middle = (layer(f"blocks.{index}", "block") for index in range(num_blocks))
    return (layer(EMBEDDINGS, "embeddings"), *middle, layer(HEAD, "head"))


def _tensors(model: nn.Module, *, tied: bool = False) -> dict[str, Tensor]:
    """Return all parameters and buffers by name; tied ones by their first name, or by every name."""
    return {
        **dict(model.named_parameters(remove_duplicate=not tied)),
        **dict(model.named_buffers(remove_duplicate=not tied)),
    }


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _tensors(model).items()}


def factor_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the names of A and B of each adapter among some parameters."""
    return [(name, name.replace(FACTOR_A, FACTOR_B)) for name in names if FACTOR_A in name]


def adapted_weight(factor: str) -> str:
    """Return the name of the weight beside which an adapter's A is."""
    return factor.replace(FACTOR_A, ADAPTED)


def of_ranks(name: str, ranks: slice) -> tuple[slice, ...]:
    """Return the index of some ranks of a tensor: rows of A, columns of B, and all of any other."""
    if FACTOR_A in name:
        return (ranks,)
    return (slice(None), ranks) if FACTOR_B in name else ()


def layer_costs(layers: LayerMap, unit: str = "layers") -> np.ndarray | None:
    """Return c_l, the cost of each block in the given unit, shape (L,).

    The result is None for units that each device measures: FLOPs, seconds and memory.
    """
    if unit in ("flops", "seconds", "memory"):
        return None
    if unit == "layers":
        return np.ones(layers.num_blocks)
    attribute = {"parameters": "elements", "bytes": "sent_bytes"}[unit]
    return np.array([getattr(block, attribute) for block in layers.blocks], dtype=np.float64)
