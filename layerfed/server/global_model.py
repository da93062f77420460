"""The global model on the server: the pretrained base and the layers that have changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
from flwr.app import Array, ArrayRecord

from layerfed.digests import digest, fingerprint
from layerfed.exchange.arrays import (
    BaseArrays,
    LiveArray,
    RefusedReply,
    carried_bytes,
    decode,
    record_of,
)
from layerfed.exchange.codecs import codec_of, read, written
from layerfed.exchange.messages import Manifest
from layerfed.models.layers import LayerMap

__all__ = ["GlobalModel"]


class GlobalModel:
    """The global model as versioned layers.

    Messages carry only layers that differ from the base, and all messages share the one copy that
    aggregation and evaluation read.

    Parameters
    ----------
    layers : LayerMap
        The split of the model into layers.
    arrays : flwr.app.ArrayRecord
        The base: every tensor of every layer, by state-dict name. Other arrays are ignored.
    codec : {"float32", "float16", "bfloat16", "int8"} (default: "float32")
        The codec in which layers go to clients.

    Attributes
    ----------
    sent : GlobalModel
        The model that clients have: this one, or one that went through the codec.

    Raises
    ------
    ValueError
        If `arrays` lacks a tensor of the layer map.
    """

    def __init__(self, layers: LayerMap, arrays: ArrayRecord, codec: str = "float32") -> None:
        self.layers = layers
        needed = [name for layer in layers.layers for name in layer.tensors]
        if missing := [name for name in needed if name not in arrays]:
            raise ValueError(f"the initial arrays lack tensors of the model: {', '.join(missing)}")
        self._arrays: dict[str, LiveArray] = {name: _live(arrays[name]) for name in needed}
        self._digests = (
            dict(arrays.digests)
            if isinstance(arrays, BaseArrays)
            else {layer.name: digest(self.layer(layer.name)) for layer in layers.layers}
        )
        self._base = dict(self._digests)
        self.sent = self if codec == "float32" else _Coded(layers, arrays, codec)

    @property
    def tensors(self) -> Mapping[str, np.ndarray]:
        """Every tensor by name, read-only; those of the base are read when they are used."""
        return Values(self._arrays)

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the layers that differ from the base."""
        return tuple(n for n, value in self._digests.items() if value != self._base[n])

    @property
    def changed_tensors(self) -> dict[str, np.ndarray]:
        """The tensors of the layers that differ from the base, by name, read-only."""
        return {tensor: t for name in self.changed for tensor, t in self.layer(name).items()}

    def manifest(self) -> Manifest:
        """Return the version of every layer, and the identity of the base."""
        return Manifest(base=fingerprint(self._base), digests=dict(self._digests))

    def layer(self, name: str) -> Mapping[str, np.ndarray]:
        """Return read-only views of the tensors of one layer, each of which is read when it is used."""
        return Values({tensor: self._arrays[tensor] for tensor in self.layers[name].tensors})

    def due(self, name: str) -> Mapping[str, np.ndarray]:
        """Return those of a layer's tensors whose updates clients send."""
        return Values({tensor: self._arrays[tensor] for tensor in self.layers[name].sent})

    def replace(self, name: str, tensors: Mapping[str, np.ndarray]) -> None:
        """Replace a layer by a new version, without copying its tensors."""
        for tensor in self.layers[name].tensors:
            # Arithmetic on a 0-d tensor (BatchNorm's batch counter) gives a scalar and not an array.
            self._arrays[tensor] = LiveArray(np.asarray(tensors[tensor]))
        self._digests[name] = digest(self.layer(name))
        if self.sent is not self:
            self.sent.replace(name, self.layer(name))

    def payload(self, layers: Iterable[str]) -> ArrayRecord:
        """Return the arrays of some layers for a message."""
        return self._record(name for layer in layers for name in self.layers[layer].tensors)

    def record(self) -> ArrayRecord:
        """Return the whole model as the record that Flower's strategies use."""
        record = self._record(self._arrays)
        # `load_state_dict` needs tied weights under each of their names.
        for alias, name in self.layers.aliases.items():
            record[alias] = self._arrays[name]
        return record

    def _record(self, names: Iterable[str]) -> ArrayRecord:
        record = ArrayRecord()
        for name in names:
            record[name] = self._arrays[name]
        return record

    def bytes(self, layers: Iterable[str]) -> int:
        """Return the size in bytes of some layers."""
        return sum(self.layers[name].bytes for name in layers)


class _Coded(GlobalModel):
    """The global model as clients have it: each layer is the base and a change that was encoded.

    Its layers follow from the exact ones and the base alone, so a checkpoint needs no more than those.
    """

    def __init__(self, layers: LayerMap, arrays: ArrayRecord, codec: str) -> None:
        super().__init__(layers, arrays)
        self._codec, self._start = codec, dict(self._arrays)
        self._parts: dict[str, ArrayRecord] = {}

    def manifest(self) -> Manifest:
        """Return the version of every layer, the identity of the base, and the codec."""
        return replace(super().manifest(), codec=self._codec)

    def replace(self, name: str, tensors: Mapping[str, np.ndarray]) -> None:
        """Encode a layer's new version, and keep what clients will decode."""
        codec = codec_of(self._codec, self.layers)
        base = Values({tensor: self._start[tensor] for tensor in self.layers[name].tensors})
        parts = written(codec, tensors, base)
        self._parts[name] = record_of(parts)
        super().replace(name, read(codec, parts, base))

    def payload(self, layers: Iterable[str]) -> ArrayRecord:
        """Return the encoded arrays of some layers for a message; every client has those of the base."""
        record = ArrayRecord()
        for layer in layers:
            for name, array in self._parts.get(layer, ArrayRecord()).items():
                record[name] = array
        return record

    def bytes(self, layers: Iterable[str]) -> int:
        """Return the encoded size in bytes of some layers."""
        return carried_bytes(self.payload(layers).values())


class Values(Mapping[str, np.ndarray]):
    """The values of arrays by name, as they are now."""

    def __init__(self, arrays: Mapping[str, LiveArray]) -> None:
        self._arrays = dict(arrays)

    def __getitem__(self, name: str) -> np.ndarray:
        """Return the values of one array."""
        return self._arrays[name].values

    def __contains__(self, name: object) -> bool:
        """Say whether there is an array of that name, without reading it."""
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        """Return the names."""
        return iter(self._arrays)

    def __len__(self) -> int:
        """Return the number of arrays."""
        return len(self._arrays)


def _live(array: Array) -> LiveArray:
    if isinstance(array, LiveArray):
        return array
    try:
        # The result is a view of the record's own bytes, so the base is not copied.
        return LiveArray(decode(array, tuple(array.shape), np.dtype(array.dtype)))
    except RefusedReply:
        # Flower writes a transposed or channels-last tensor column by column.
        return LiveArray(np.asarray(array.numpy(), order="C"))
