"""The client's resident model: one per process, updated by the layers that differ between versions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod
from torch import Tensor, nn

from layerfed.client.base import KnownDigests, on_disk
from layerfed.config import Storage
from layerfed.digests import digest, fingerprint
from layerfed.exchange.arrays import BaseArrays, LazyArray, decode
from layerfed.exchange.codecs import codec_of, read
from layerfed.exchange.messages import (
    Manifest,
    has_manifest,
    missing_reply,
    read_manifest,
    state_held,
)
from layerfed.exchange.store import LayerStore
from layerfed.models.layers import LayerMap
from layerfed.models.stored import (
    Decoded,
    Stored,
    as_stored,
    decoded,
    held_bytes,
    is_lossy,
    owners,
    put,
)
from layerfed.models.weights import (
    files_of,
    half_as_stored,
    in_float32,
    refuse_not_finite,
)

__all__ = ["MissingLayers", "ResidentModel", "keeping_layers"]


# The codec of layers that come as they are.
EXACT = "float32"


class MissingLayers(LookupError):
    """Error for layers that a message needs and this node lacks; the server sends them again."""

    def __init__(self, layers: Sequence[str]) -> None:
        super().__init__(f"no arrays for layers {', '.join(layers)}, unknown here")
        self.layers = tuple(layers)


def keeping_layers(store_of: Callable[[Context], LayerStore]) -> Mod:
    """Return a Flower mod that reports to the server which layers a node lacks and keeps.

    It turns `MissingLayers` into a reply on which the server sends the layers again. To other replies it
    adds the layers of the global model that the node keeps, so that they are not sent again.

    Parameters
    ----------
    store_of : Callable[[flwr.app.Context], LayerStore]
        Returns the node's store, the same one that `ResidentModel.move_to` gets.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        try:
            reply = call_next(message, context)
        except MissingLayers as error:
            reply = missing_reply(message, error.layers)
        if reply.has_content():
            store = store_of(context)
            versions = read_manifest(message)[0].digests.values() if has_manifest(message) else ()
            state_held(reply, [v for v in versions if store.has(v)], store.identity)
        return reply

    return mod


class ResidentModel:
    """A model that stays in memory between messages.

    Building and loading a foundation model takes far longer than a round of work on a few of its layers.
    So a process builds it once, and each message then loads only layers whose digest differs.

    Parameters
    ----------
    build : Callable[[], nn.Module]
        Builds the base. It is called once, and again only if a later message needs a layer at its base
        version (in a process that serves a second run).
    layers : Callable[[nn.Module], LayerMap]
        Splits the model into layers.
    device : torch.device
        The model's device.
    storage : {"checkpoint", "float32", "bfloat16", "float16", "int8", "4bit"}
        The type of the frozen layers. Layers that have changed since the base, and the head, are in
        float32, and so is everything that is trained.
    adapted : Callable[[nn.Module], nn.Module]
        Returns the model with adapters, if it is to have some.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        layers: Callable[[nn.Module], LayerMap],
        device: torch.device,
        storage: Storage = "checkpoint",
        adapted: Callable[[nn.Module], nn.Module] = lambda model: model,
    ) -> None:
        self._own_build = build
        self._adapted = adapted
        self.device = device
        self.storage = storage
        self.model = self._build()
        # Half a checkpoint's tensors may be half its precision; the frozen ones of them stay so.
        self._casts = storage not in ("checkpoint", "float32") or any(
            isinstance(parameter, Stored) for parameter in self.model.parameters()
        )
        if not self._casts:
            self.model.to(device)
        self.layers = layers(self.model)
        self.tensors: dict[str, Tensor] = {
            **dict(self.model.named_parameters()),
            **dict(self.model.named_buffers()),
        }
        self._owners = owners(self.model)
        # The checkpoint's own weights of layers that are held in less; they are mapped files.
        self._exact: dict[str, Tensor] = {}
        self._base = self._versions()
        self._digests: dict[str, str | None] = dict(self._base)
        # The base's values of changed layers, in runs that send changes since the base.
        self._origin: dict[str, dict[str, Tensor]] = {}
        if self._casts:
            self._hold(self.tensors, self.tensors)

    def _build(self) -> nn.Module:
        make = in_float32 if self.storage == "float32" else half_as_stored
        return self._adapted(make(self._own_build()))

    def _versions(self) -> dict[str, str]:
        """Return the digest of each layer as the checkpoint has it, whatever this node makes of it."""
        known = KnownDigests.of(self.model, self.layers)
        fresh = [layer for layer in self.layers.layers if layer.name not in known.digests]
        found = {}
        for layer in fresh:
            refuse_not_finite({name: self.tensors[name] for name in layer.parameters})
            found[layer.name] = self._digest(layer.name)
            if self._casts and files_of(self.model):
                # Before the next layer, so that the file is never whole in memory.
                lossy = {n: self.tensors[n] for n in layer.tensors}
                on_disk({n: t for n, t in lossy.items() if is_lossy(t, self.storage)}, mapped=True)
        known.add(found)
        return {name: known.digests.get(name) or found[name] for name in self.layers.names}

    def _digest(self, layer: str) -> str:
        return digest(Decoded(self._values(layer)))

    def _values(self, layer: str) -> dict[str, Tensor]:
        """Return a layer's tensors, of frozen ones the checkpoint's."""
        return {
            name: self._exact.get(name, self.tensors[name]).detach()
            for name in self.layers[layer].tensors
        }

    def _hold(self, names: Iterable[str], values: Mapping[str, Tensor]) -> None:
        """Put the checkpoint's values of some tensors into the model, as they are held when frozen."""
        storable = {name for layer in self.layers.storable for name in layer.parameters}
        tables = {
            f"{name}.weight"
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        }
        lossy: dict[str, Tensor] = {}
        mapped = bool(files_of(self.model))
        for name in list(names):
            exact = values[name].detach()
            kind: Storage = self.storage if name in storable else "float32"
            self.tensors[name] = put(
                self._owners[name], as_stored(exact, kind, self.device, table=name in tables)
            )
            if is_lossy(exact, kind):
                # Of a mapped file at once, so that it is never in memory beside what was made of it.
                lossy |= on_disk({name: exact}, mapped=True) if mapped else {name: exact}
        self._exact |= lossy if mapped else on_disk(lossy, mapped=False)

    @property
    def base(self) -> str:
        """The fingerprint of the pretrained base."""
        return fingerprint(self._base)

    def values(self, name: str) -> np.ndarray:
        """Return the values of a tensor as they are now, of a frozen one the checkpoint's."""
        return _as_array(decoded(self._exact.get(name, self.tensors[name])))

    def base_version(self, layer: str) -> str:
        """Return the digest of a layer of the base."""
        return self._base[layer]

    @property
    def nbytes(self) -> int:
        """The bytes that the model takes in memory, mapped files included."""
        return held_bytes(self.tensors)

    @property
    def lowest_changed(self) -> int:
        """The index of the lowest block that differs from the base; L if none does."""
        names = [block.name for block in self.layers.blocks]
        changed = (i for i, n in enumerate(names) if self._digests[n] != self._base[n])
        return next(changed, len(names))

    def version(self, names: Iterable[str]) -> str | None:
        """Return the version of some layers together, or None if one of them is lent."""
        found = {name: self._digests[name] for name in names}
        known = {name: version for name, version in found.items() if version is not None}
        return fingerprint(known) if len(known) == len(found) else None

    def base_arrays(self) -> BaseArrays:
        """Return the base for the server: every tensor by name, of which none is copied.

        A tensor that is not held in float32 on the CPU is cast or fetched each time that it is read.
        """
        changed = [name for name, value in self._digests.items() if value != self._base[name]]
        source = self._build().state_dict(keep_vars=True) if changed else {}
        record = BaseArrays(self._base)
        for layer in self.layers.layers:
            held = source if layer.name in changed else self._values(layer.name)
            for name in layer.tensors:
                value = held[name].detach()
                shape, dtype = tuple(value.shape), _dtype(value)
                record[name] = LazyArray(partial(_as_array, value), dtype, shape)
        return record

    def base_state(self) -> dict[str, np.ndarray]:
        """Return copies of the base's tensors, by name."""
        return {name: array.numpy() for name, array in self.base_arrays().items()}

    def move_to(
        self,
        manifest: Manifest,
        arrays: Mapping[str, np.ndarray] | ArrayRecord,
        store: LayerStore | None = None,
    ) -> None:
        """Bring the model to a global version, loading only layers that differ.

        Parameters
        ----------
        manifest : Manifest
        arrays : Mapping[str, numpy.ndarray] or flwr.app.ArrayRecord
            Tensors of layers that came with the message, in the manifest's codec. Other layers are read
            from the store.
        store : LayerStore, optional
            The store for layers between messages. Layers that came with the message are added to it.

        Raises
        ------
        MissingLayers
            If a layer is not in the model, the message or the store, and not at its base version. The
            model is unchanged then.
        ValueError
            If the server's base differs from this client's, or if it names layers that the model does
            not have.
        """
        if manifest.base != self.base:
            raise ValueError(
                f"the server's pretrained model ({manifest.base}) is not this client's ({self.base}); "
                "both must load the same weights, with the same seed for the new head"
            )
        if manifest.digests.keys() != self._digests.keys():
            raise ValueError("the server's model is split into other layers than this client's")
        keep = manifest.digests.values()
        found: dict[str, dict[str, Tensor]] = {}
        back: list[str] = []
        missing: list[str] = []
        for name, version in manifest.digests.items():
            names, differs = self.layers[name].tensors, self._digests[name] != version
            if (differs or store is not None) and all(tensor in arrays for tensor in names):
                came = self._received(name, arrays, manifest.codec)
                if store is not None:
                    store.put(version, {n: t.numpy() for n, t in came.items()}, keep)
            elif not differs:
                continue
            elif version == self._base[name]:
                back.append(name)
                continue
            else:
                kept = store.get(version) if store is not None else None
                if kept is None:
                    missing.append(name)
                    continue
                came = self._received(name, kept)
            if differs:
                found[name] = came
        if missing:
            raise MissingLayers(missing)
        for name, values in found.items():
            if manifest.codec != EXACT and self._digests[name] == self._base[name]:
                self._origin[name] = self._values(name)
            self._load(name, values)
            self._digests[name] = manifest.digests[name]
        if back:
            self._go_back(back)

    def _go_back(self, layers: Sequence[str]) -> None:
        """Put layers back to their base version, the only case in which the base is loaded again."""
        rebuilt = self._build().state_dict(keep_vars=True)
        for layer in layers:
            values = {name: rebuilt[name] for name in self.layers[layer].tensors}
            if self._casts:
                self._hold(values, values)
            else:
                self._load(layer, values)
            self._digests[layer] = self._base[layer]

    def _received(
        self, layer: str, arrays: Mapping[str, np.ndarray] | ArrayRecord, codec_name: str = EXACT
    ) -> dict[str, Tensor]:
        codec = codec_of(codec_name, self.layers)
        parts: dict[str, np.ndarray] = {}
        for name in self.layers[layer].tensors:
            held = self.tensors[name]
            like = np.broadcast_to(np.zeros((), _dtype(held)), tuple(held.shape))
            for part, (shape, dtype) in codec.parts_of(name, like).items():
                value = arrays[part]
                parts[part] = (
                    value if isinstance(value, np.ndarray) else decode(value, shape, dtype)
                )
        if codec_name != EXACT:
            parts = read(codec, parts, self._base_of(layer))
        with warnings.catch_warnings():
            # torch warns that received bytes are read-only; `_load` only reads them.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return {name: torch.from_numpy(value) for name, value in parts.items()}

    def _base_of(self, layer: str) -> dict[str, np.ndarray]:
        """Return the base's values of a layer; they are loaded again if nothing has kept them."""
        if self._digests[layer] == self._base[layer]:
            self._origin[layer] = self._values(layer)
        elif layer not in self._origin:
            rebuilt = self._build().state_dict(keep_vars=True)
            for name in self.layers.names:
                tensors = {tensor: rebuilt[tensor].detach() for tensor in self.layers[name].tensors}
                self._origin.setdefault(name, tensors)
        return {name: _as_array(value) for name, value in self._origin[layer].items()}

    def _load(self, layer: str, values: Mapping[str, Tensor]) -> None:
        self._digests[layer] = None
        for name, value in values.items():
            self._exact.pop(name, None)
            held = self.tensors[name]
            if self._casts and value.shape == held.shape and value.device == self.device:
                self.tensors[name] = put(self._owners[name], value)  # nobody writes to either
                continue
            # In a new place: the server may read the base from the old one.
            self._replace(name, torch.empty_like(held.detach()).copy_(decoded(value)))

    def _replace(self, name: str, value: Tensor) -> None:
        """Put another value of a tensor into the model."""
        if self._casts:
            self.tensors[name] = put(self._owners[name], value)
        else:
            self.tensors[name].data = value

    @contextmanager
    def borrowed(self, names: Sequence[str]) -> Iterator[Mapping[str, Tensor]]:
        """Lend layers for local training, and restore the global version afterwards.

        The model trains on copies in float32. The tensors θ^t themselves are set aside and yielded, so
        that Δ_i can be computed from them, and are put back by reference. A layer counts as unknown
        while it is lent, so a training step that raises cannot leak into the next client.
        """
        tensors = [t for name in names for t in (*self.layers[name].sent, *self.layers[name].own)]
        # As they are held; of those held in less, θ^t is the checkpoint's value.
        held = {t: self.tensors[t] if self._casts else self.tensors[t].data for t in tensors}
        before = Decoded({t: self._exact.get(t, value) for t, value in held.items()}, self.device)
        versions = {name: self._digests[name] for name in names}
        for name in names:
            self._digests[name] = None
        try:
            for tensor in tensors:
                self._replace(tensor, before[tensor].clone())
            yield before
        finally:
            for tensor, value in held.items():
                self._replace(tensor, value)
            self._digests.update(versions)

    @contextmanager
    def wearing(self, own: Mapping[str, np.ndarray]) -> Iterator[None]:
        """Put a client's own values of some tensors into the model, and the global ones back afterwards.

        A layer counts as unknown meanwhile, as in `borrowed`, which may be used within.
        """
        with self.borrowed(sorted({self.layers.layer_of(name).name for name in own})):
            exact = {name: self._exact.pop(name) for name in own if name in self._exact}
            try:
                for name, value in own.items():
                    self._replace(name, torch.from_numpy(value).to(self.device))
                yield
            finally:
                self._exact |= exact


def _dtype(tensor: Tensor) -> np.dtype[Any]:
    """Return the type in which a tensor travels."""
    return decoded(torch.empty(0, dtype=tensor.dtype)).numpy().dtype


def _as_array(tensor: Tensor) -> np.ndarray:
    values: np.ndarray = decoded(tensor).cpu().numpy()
    return values
