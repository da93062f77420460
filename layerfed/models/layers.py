"""A model as an ordered list of layers: embeddings, blocks 0 … L-1, head.

Masks, budgets, costs, probes, messages, versions and plots are all per layer, so everything in this
package starts from a `LayerMap`. Embeddings are frozen, blocks are selectable, and every client trains
the head in every round [S, section V].
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from layerfed.config.section import words
from layerfed.models.block_finder import (
    LayerMapError,
    find_blocks,
    lies_in,
    match_blocks,
    match_tensors,
    refuse_lazy,
    refuse_left_over,
    refuse_no_head,
)
from layerfed.models.factors import FACTOR_A
from layerfed.models.placement import (
    EMBEDDINGS,
    HEAD,
    ByUse,
    Placement,
    aliases,
    in_order_of_use,
    outermost,
    place,
    refuse_reaching_down,
    tensors_of,
    tied_names,
    traced,
)
from layerfed.models.trace import Forward
from layerfed.models.units import BLOCKS, find_units

__all__ = ["Layer", "LayerMap", "LayerMapError", "layer_costs"]


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
            owner = Placement(model, names, in_head, frozen)
        else:
            names = in_order_of_use(names, seen)
            owner = ByUse(model, names, in_head, frozen, seen.uses(names))
        layer_of, aliases = place(model, owner)
        if blocks or seen is None:
            refuse_left_over(model, names, apart, seen)
        parts = find_units(model, names, units, None if seen is None else seen.order)
        whole = layer_of
        layer_of = {name: parts.layer(name, place) for name, place in whole.items()}
        modules = outermost(model, layer_of, owner, parts)
        layers = _layers(model, layer_of, modules, len(parts.names))
        if not layers[-1].parameters:
            refuse_no_head(names)
        for layer, name in zip(layers[1:], parts.names, strict=False):
            if not layer.parameters:
                raise LayerMapError(
                    f"{name} has no tensors of its own, so it cannot be a block; name others "
                    "(model.blocks)"
                )
        if seen is not None and isinstance(owner, ByUse):
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
        rest = {name: HEAD if name in head else EMBEDDINGS for name in tensors_of(model)}
        modules = {module: layer.name for layer in self.layers for module in layer.modules}
        places = {**rest, **adapters, **weights}
        layers = _layers(model, places, modules, self.num_blocks, weights, own)
        shapes = _shapes(model)
        return LayerMap(
            layers, aliases(tied_names(model)), shapes, True, self.personal, self.skippable
        )

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
        for pattern in words(personal):
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
        places = {
            n: EMBEDDINGS if n in frozen else self.layer_of(n).name for n in tensors_of(model)
        }
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


def _layers(
    model: nn.Module,
    layer_of: Mapping[str, str],
    modules: Mapping[str, str],
    num_blocks: int,
    frozen: Collection[str] = (),
    own: Collection[str] = (),
) -> tuple[Layer, ...]:
    """Return the layers in order, each with its tensors and modules."""
    tensors = tensors_of(model)
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


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}


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
