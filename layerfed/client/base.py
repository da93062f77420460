"""The pretrained base as files: digests that are remembered, and exact weights that wait on the disk."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from logging import WARNING
from pathlib import Path

import torch
from flwr.common.logger import log
from torch import Tensor, nn

from layerfed.digests import content_digest
from layerfed.exchange.store import user_cache
from layerfed.files import whole
from layerfed.models.layers import LayerMap
from layerfed.models.stored import Half, page_out
from layerfed.models.weights import files_of

__all__ = ["KnownDigests", "on_disk"]

# Tensors in a file begin at multiples of this, as in memory.
ALIGNED = 64


@dataclass
class KnownDigests:
    """The digests of a checkpoint's layers, computed once a file and remembered in the user's cache.

    The files are known by path, size, time of change and inode. A layer with tensors that are not in the
    files, such as the head, is not remembered.

    Attributes
    ----------
    digests : dict[str, str]
        What is remembered, by layer.
    """

    digests: dict[str, str] = field(default_factory=dict)
    _place: Path | None = None
    _layers: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, layers: LayerMap) -> KnownDigests:
        """Return what is remembered of a model's files; nothing if it came from none."""
        files = files_of(model)
        if files is None:
            return cls()
        whole_layers = [x for x in layers.layers if files.drawn.isdisjoint(x.tensors)]
        known = []
        for path in files.paths:
            found = path.stat()
            known.append((str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ino))
        split = [[(name, layers.shapes[name]) for name in x.tensors] for x in whole_layers]
        # Another version of the library may read the same file differently.
        key = json.dumps([known, split, version("transformers")])
        place = user_cache() / "bases" / f"{content_digest(key)}.json"
        names = tuple(layer.name for layer in whole_layers)
        with suppress(OSError, ValueError):
            found = json.loads(place.read_text(encoding="utf-8"))
            if isinstance(found, dict) and found.keys() == set(names):
                return cls(found, place, names)
        return cls({}, place, names)

    def add(self, digests: Mapping[str, str]) -> None:
        """Remember digests, as far as they are those of the files."""
        if self._place is None or self.digests:
            return
        try:
            self._place.parent.mkdir(parents=True, exist_ok=True)
            with whole(self._place, shared=True) as beside:
                beside.write_text(json.dumps({name: digests[name] for name in self._layers}))
        except OSError as error:
            log(WARNING, "%s could not be kept: %s", self._place, error)


def on_disk(tensors: Mapping[str, Tensor], *, mapped: bool) -> dict[str, Tensor]:
    """Return the same tensors, none of which takes memory while it is not read.

    Parameters
    ----------
    tensors : Mapping[str, Tensor]
        On the CPU.
    mapped : bool
        Whether they are views of mapped files. Otherwise they are written to a file without a name in
        the user's cache, which is gone when the process ends.
    """
    if mapped or not tensors:
        for tensor in tensors.values():
            page_out(_plain(tensor))
        return dict(tensors)
    folder = user_cache()
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, tuple[int, Tensor]] = {}
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for name, tensor in tensors.items():
            file.seek(-(-file.tell() // ALIGNED) * ALIGNED)
            values = _plain(tensor).contiguous()
            places[name] = (file.tell(), values[:0] if values.ndim else values)
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        # Private: the mapping outlives the file's name.
        content = torch.from_file(file.name, shared=False, size=file.tell(), dtype=torch.uint8)
    found = {}
    for name, (start, like) in places.items():
        shape = tensors[name].shape
        part = content[start : start + shape.numel() * like.element_size()]
        found[name] = part.view(like.dtype).view(shape)
    return found


def _plain(tensor: Tensor) -> Tensor:
    """Return a frozen tensor as the checkpoint has it."""
    held = getattr(tensor, "held", None)
    return held.values if isinstance(held, Half) else tensor.detach()
