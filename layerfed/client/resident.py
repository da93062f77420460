"""The client's resident model: one per process, updated by the layers that differ between versions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod
from torch import Tensor, nn

from layerfed.digests import digest, fingerprint
from layerfed.exchange.arrays import decode
from layerfed.exchange.messages import (
    Manifest,
    has_manifest,
    missing_reply,
    read_manifest,
    state_held,
)
from layerfed.exchange.store import LayerStore
from layerfed.models.layers import LayerMap
from layerfed.models.weights import in_float32, refuse_not_finite

__all__ = ["MissingLayers", "ResidentModel", "keeping_layers"]


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
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        layers: Callable[[nn.Module], LayerMap],
        device: torch.device,
    ) -> None:
        self._own_build = build
        self.device = device
        self.model = self._build().to(device)
        self.layers = layers(self.model)
        self.tensors: dict[str, Tensor] = {
            **dict(self.model.named_parameters()),
            **dict(self.model.named_buffers()),
        }
        refuse_not_finite({n: self.tensors[n] for x in self.layers.layers for n in x.parameters})
        self._base = {layer.name: self._digest(layer.name) for layer in self.layers.layers}
        self._digests: dict[str, str | None] = dict(self._base)

    def _build(self) -> nn.Module:
        return in_float32(self._own_build())

    def _digest(self, layer: str) -> str:
        return digest({name: self.tensors[name].detach() for name in self.layers[layer].tensors})

    @property
    def base(self) -> str:
        """The fingerprint of the pretrained base."""
        return fingerprint(self._base)

    def base_state(self) -> dict[str, np.ndarray]:
        """Return copies of the base's tensors that can be sent, by name."""
        changed = [name for name, value in self._digests.items() if value != self._base[name]]
        source = self._build().state_dict() if changed else self.tensors
        return {
            name: source[name].detach().cpu().numpy().copy()
            for layer in self.layers.layers
            for name in layer.tensors
        }

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
            Tensors of layers that came with the message. Other layers are read from the store.
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
            names = self.layers[name].tensors
            if all(tensor in arrays for tensor in names):
                came = {n: self._received(n, arrays) for n in names}
                if store is not None:
                    store.put(version, {n: t.numpy() for n, t in came.items()}, keep)
            elif self._digests[name] == version:
                continue
            elif version == self._base[name]:
                back.append(name)
                continue
            else:
                kept = store.get(version) if store is not None else None
                if kept is None:
                    missing.append(name)
                    continue
                came = {n: self._received(n, kept) for n in names}
            if self._digests[name] != version:
                found[name] = came
        if missing:
            raise MissingLayers(missing)
        if back:
            # A layer is needed at its base version, the only case in which the base is loaded again.
            rebuilt = self._build().state_dict()
            found.update(
                {name: {n: rebuilt[n] for n in self.layers[name].tensors} for name in back}
            )
        for name, values in found.items():
            self._load(name, values)
            self._digests[name] = manifest.digests[name]

    def _received(self, name: str, arrays: Mapping[str, np.ndarray] | ArrayRecord) -> Tensor:
        value = arrays[name]
        if not isinstance(value, np.ndarray):
            like = self.tensors[name]
            dtype = torch.empty(0, dtype=like.dtype).numpy().dtype
            value = decode(value, tuple(like.shape), dtype)
        with warnings.catch_warnings():
            # torch warns that received bytes are read-only; `_load` only reads them.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(value)

    def _load(self, layer: str, values: Mapping[str, Tensor]) -> None:
        self._digests[layer] = None
        with torch.no_grad():
            for name, value in values.items():
                self.tensors[name].copy_(value)

    @contextmanager
    def borrowed(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Lend layers for local training, and restore the global version afterwards.

        The model trains on copies. The tensors θ^t themselves are set aside and yielded, so that Δ_i can
        be computed from them, and are put back by reference. A layer counts as unknown while it is lent,
        so a training step that raises cannot leak into the next client.
        """
        before = {
            tensor: self.tensors[tensor].data
            for name in names
            for tensor in self.layers[name].tensors
        }
        versions = {name: self._digests[name] for name in names}
        for name in names:
            self._digests[name] = None
        try:
            for tensor, value in before.items():
                self.tensors[tensor].data = value.clone()
            yield before
        finally:
            for tensor, value in before.items():
                self.tensors[tensor].data = value
            self._digests.update(versions)
