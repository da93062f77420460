"""Parts of blocks as units of selection: an attention and an MLP, or what a pattern names.

A unit has one core module. Everything else of a block goes with the next core of the block, in the order
of use, and what follows the last core goes with it: a norm before the attention with the attention.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from layerfed.models.block_finder import LayerMapError, lies_in, match_blocks, some

__all__ = ["ATTENTION_MLP", "BLOCKS", "Units", "find_units"]

BLOCKS, ATTENTION_MLP = "blocks", "attention-mlp"
ATTENTION = re.compile("attn|attention", re.IGNORECASE)


@dataclass(frozen=True)
class Units:
    """The units of a model.

    Attributes
    ----------
    blocks : Sequence[str]
        Names of the blocks, input first.
    cores : Sequence[Sequence[str]]
        The cores of each block's units, in the order of use.
    order : Mapping[str, int]
        When each module is used; modules without an entry are used with the module around them.
    """

    blocks: Sequence[str]
    cores: Sequence[Sequence[str]]
    order: Mapping[str, int]

    @property
    def names(self) -> list[str]:
        """The names of all cores, input first."""
        return [core for cores in self.cores for core in cores]

    def layer(self, name: str, place: str) -> str:
        """Return the layer of a module or tensor, given the layer that it has with whole blocks."""
        kind, _, number = place.partition(".")
        if not number:
            return place
        index = int(number)
        cores = self.cores[index]
        before = sum(len(others) for others in self.cores[:index])
        return f"{kind}.{before + self._unit(name, self.blocks[index], cores)}"

    def _unit(self, name: str, block: str, cores: Sequence[str]) -> int:
        for unit, core in enumerate(cores):
            if lies_in(name, [core]):
                return unit
        while name not in self.order and name not in ("", block):
            name = name.rpartition(".")[0]
        time = self.order.get(name, -1) if lies_in(name, [block]) else -1
        later = (unit for unit, core in enumerate(cores) if self.order[core] > time)
        return next(later, len(cores) - 1)


def find_units(
    model: nn.Module, blocks: Sequence[str], units: str, order: Mapping[str, int] | None = None
) -> Units:
    """Return the units of a model's blocks.

    Parameters
    ----------
    model : nn.Module
    blocks : Sequence[str]
        Names of the blocks, input first.
    units : str
        `blocks`, `attention-mlp`, or patterns of modules inside the blocks.
    order : Mapping[str, int], optional
        When each module is used; by default in the order of registration.

    Raises
    ------
    LayerMapError
        If a block does not have these parts.
    """
    modules = dict(model.named_modules())
    order = order or {name: index for index, name in enumerate(modules)}
    if units == BLOCKS:
        cores = [[name] for name in blocks]
    elif units == ATTENTION_MLP:
        cores = [_attention_and_mlp(modules, name, order) for name in blocks]
    else:
        found = match_blocks(model, units, "model.units")
        if outside := [name for name in found if not lies_in(name, blocks)]:
            raise LayerMapError(
                f"model.units = '{units}' matches {some(outside)}, outside of the blocks; name modules "
                f"inside of {blocks[0]} and its like, as in '{blocks[0]}.…' with * for the number"
            )
        if unused := [name for name in found if name not in order]:
            raise LayerMapError(
                f"model.units = '{units}' matches {some(unused)}, which the model does not call"
            )
        cores = [
            sorted((name for name in found if lies_in(name, [block])), key=order.__getitem__)
            for block in blocks
        ]
        if bare := [block for block, own in zip(blocks, cores, strict=True) if not own]:
            raise LayerMapError(f"model.units = '{units}' matches nothing in {some(bare)}")
    return Units(blocks, cores, order)


def _attention_and_mlp(
    modules: Mapping[str, nn.Module], block: str, order: Mapping[str, int]
) -> list[str]:
    """Return the last attention of a block, and the last module with matrices after it."""
    inside, parts = block, [block]
    while len(parts) == 1:  # T5 has its parts in a list
        inside = parts[0]
        parts = [
            f"{inside}.{name}"
            for name, child in modules[inside].named_children()
            if f"{inside}.{name}" in order and any(p.ndim > 1 for p in child.parameters())
        ]
    parts = sorted(parts, key=order.__getitem__)
    is_attention = [
        ATTENTION.search(f"{name.removeprefix(inside)} {type(modules[name]).__name__}") is not None
        for name in parts
    ]
    if not any(is_attention) or is_attention[-1]:
        raise LayerMapError(
            f"model.units = 'attention-mlp', but {block} has no attention with an MLP after it; name "
            "its parts by a pattern (model.units), or leave model.units=blocks"
        )
    last = max(place for place, on in enumerate(is_attention) if on)
    return [parts[last], parts[-1]]
