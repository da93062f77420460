"""The layer of each tensor and module of a model, given its blocks.

A tensor goes by its use in a forward pass, or without one by the order of registration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn

from layerfed.models.block_finder import LayerMapError, are_convolutions, lies_in, some
from layerfed.models.trace import Forward, Trace, Uses, trace
from layerfed.models.units import Units

__all__ = [
    "EMBEDDINGS",
    "HEAD",
    "ByUse",
    "Placement",
    "aliases",
    "in_order_of_use",
    "outermost",
    "place",
    "refuse_reaching_down",
    "tensors_of",
    "tied_names",
    "traced",
]

EMBEDDINGS, HEAD = "embeddings", "head"

# Tensors that are registered before the blocks but used after them, such as open_clip's `proj`. All
# other tensors before the blocks are embeddings.
LATE = {"proj", "ln_post", "logit_scale", "logit_bias", "head", "classifier", "lm_head"}


class Placement:
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


class ByUse(Placement):
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
        If the model cannot run, or its result has no gradient.
    """
    try:
        found = trace(model, forward)
    except Exception as error:  # a model may raise anything
        if any(parameter.is_meta for parameter in model.parameters()):
            # Some operations need values, as those that send tokens to experts do.
            return traced(_of_zeros(model), forward)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise LayerMapError(
            f"the model cannot score an example, so the use of its layers is unknown: {reason}; choose "
            "another model, or sizes that fit it (model.name, task.max-tokens, task.image-size)"
        ) from error
    if not found.result:
        raise LayerMapError(
            "the model's scores depend on none of its parameters; does it, or the task's `logits`, run "
            "under torch.no_grad() or detach them?"
        )
    return found


def _of_zeros(model: nn.Module) -> nn.Module:
    """Return a copy of a skeleton on the CPU, of zeros, which take memory once they are written to."""

    def zeros(tensor: Tensor) -> Tensor:
        memory = torch.from_numpy(np.zeros(tensor.numel() * tensor.element_size(), dtype=np.uint8))
        return memory.view(tensor.dtype).view(tensor.shape)

    tensors: dict[int, Tensor] = {id(b): zeros(b) for b in model.buffers()}
    tensors |= {id(p): nn.Parameter(zeros(p), p.requires_grad) for p in model.parameters()}
    return deepcopy(model, tensors)


def in_order_of_use(blocks: Sequence[str], seen: Trace) -> list[str]:
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


def outermost(
    model: nn.Module, layer_of: Mapping[str, str | None], owner: Placement, units: Units
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


def place(model: nn.Module, owner: Placement) -> tuple[dict[str, str], dict[str, str]]:
    """Return the layer of every tensor, and the further names of tied tensors."""
    groups = tied_names(model)
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
    return layer_of, aliases(groups)


def tied_names(model: nn.Module) -> list[list[str]]:
    """Return all names of each tensor."""
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors_of(model, tied=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def aliases(groups: Sequence[Sequence[str]]) -> dict[str, str]:
    """Return the further names of tensors, each with the tensor's first name."""
    return {name: first for first, *others in groups for name in others}


def tensors_of(model: nn.Module, *, tied: bool = False) -> dict[str, Tensor]:
    """Return all parameters and buffers by name; tied ones by their first name, or by every name."""
    return {
        **dict(model.named_parameters(remove_duplicate=not tied)),
        **dict(model.named_buffers(remove_duplicate=not tied)),
    }
