"""The layer store: layers by content digest, kept between messages, so that no layer is sent twice.

A SuperNode starts a process for each message, so its layers must be kept on disk. If the server and its
clients are on one machine, they use the same store, and no layer is sent between them at all.
"""

from __future__ import annotations

import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import lru_cache
from logging import WARNING
from pathlib import Path
from uuid import uuid4

import numpy as np
from flwr.common.logger import log
from safetensors import SafetensorError
from safetensors.numpy import load_file

from layerfed.config import ConfigError, expanded
from layerfed.digests import content_digest, digest
from layerfed.files import save_tensors, whole

__all__ = ["FolderStore", "LayerStore", "MemoryStore", "open_store", "user_cache"]

MEMORY = "memory"
IDENTITY = "identity"
# A digest names a file, so a digest in a message must match this in full.
DIGEST = re.compile(r"[0-9a-f]{32}")
# A layer or what a client remembers, perhaps in a temporary file. Other files are not the store's.
OWN_NAME = re.compile(r"(\.?)(own-)?[0-9a-f]{32}\.safetensors(\.[0-9a-f]{32}\.tmp)?")
# Age at which a temporary file of a killed process is removed.
LITTER_SECONDS = 3600.0
# A run whose clients remember something may pause that long.
OWN_SECONDS = 30 * 86400.0

Tensors = Mapping[str, np.ndarray]


class LayerStore(ABC):
    """Layers by content digest, and a client's own tensors.

    Attributes
    ----------
    identity : str
        A name of this store, the same for every process that reads it; no other store has it.
    """

    identity: str

    @abstractmethod
    def has(self, name: str) -> bool:
        """Return whether a layer of that digest is kept."""

    @abstractmethod
    def get(self, name: str) -> dict[str, np.ndarray] | None:
        """Return a layer by digest, or None. A returned layer has that digest."""

    @abstractmethod
    def put(self, name: str, tensors: Tensors, keep: Collection[str]) -> None:
        """Keep a layer under its digest.

        Parameters
        ----------
        name : str
            The layer's digest.
        tensors : Mapping[str, numpy.ndarray]
        keep : Collection[str]
            Digests that must not be evicted, since the current round needs them.
        """

    @abstractmethod
    def recall(self, key: str) -> dict[str, np.ndarray] | None:
        """Return the tensors that were remembered under a key, or None if they are lost."""

    @abstractmethod
    def remember(self, key: str, tensors: Tensors) -> None:
        """Keep tensors of the client's own, such as error feedback, under any key."""


class MemoryStore(LayerStore):
    """The store of one process, which keeps only the current version of each layer.

    The in-process engine uses it: its server and clients share arrays by reference.
    """

    def __init__(self) -> None:
        self.identity = uuid4().hex
        self._layers: Mapping[str, dict[str, np.ndarray]] = {}
        self.own: dict[str, dict[str, np.ndarray]] = {}

    def has(self, name: str) -> bool:
        """Return whether a layer of that digest is kept."""
        return name in self._layers

    def get(self, name: str) -> dict[str, np.ndarray] | None:
        """Return a layer by digest, or None."""
        return self._layers.get(name)

    def put(self, name: str, tensors: Tensors, keep: Collection[str]) -> None:
        """Keep a layer, by reference, and drop all that are not in `keep`."""
        kept = {n: t for n, t in self._layers.items() if n in keep}
        self._layers = {**kept, name: dict(tensors)}

    def borrow(
        self,
        identity: str,
        layers: Mapping[str, dict[str, np.ndarray]],
        own: Mapping[str, dict[str, np.ndarray]],
    ) -> None:
        """Show another process's store: its identity, its layers, and what one client remembers."""
        self.identity, self._layers, self.own = identity, layers, dict(own)

    def recall(self, key: str) -> dict[str, np.ndarray] | None:
        """Return the tensors that were remembered under a key, or None."""
        return self.own.get(key)

    def remember(self, key: str, tensors: Tensors) -> None:
        """Keep tensors by reference, and drop those of other runs."""
        run = key.partition("/")[0]
        self.own = {k: t for k, t in self.own.items() if k.partition("/")[0] == run}
        self.own[key] = dict(tensors)


class FolderStore(LayerStore):
    """A folder of safetensors files, each named by its layer's digest.

    Several processes may use it at once. Files are written beside their place and renamed, and all files
    of one digest are equal. A file that is gone or damaged counts as not kept.

    Parameters
    ----------
    folder : Path
        The folder, which is created if it does not exist.
    size : float
        Most bytes to keep. The least recently used layers are dropped first. What a client remembers,
        which nobody else has, counts and is dropped only after a month without use.

    Raises
    ------
    ConfigError
        If the folder cannot be written.
    """

    def __init__(self, folder: Path, size: float) -> None:
        self.folder = folder
        self.size = size
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.identity = self._identify()
        except OSError as error:
            raise ConfigError(
                f"the layer store {folder} cannot be written: {error.strerror}; name another folder "
                "(exchange.store, or store in the node's --node-config)"
            ) from None

    def _identify(self) -> str:
        file = self.folder / IDENTITY
        if not file.exists():
            # Only the first process that uses a folder imports this and waits.
            from filelock import FileLock

            with FileLock(self.folder / ".lock"):
                if not file.exists():
                    with whole(file) as beside:
                        beside.write_text(uuid4().hex, encoding="ascii")
        return file.read_text(encoding="ascii")

    def _file(self, name: str) -> Path:
        if not DIGEST.fullmatch(name):
            raise ValueError(f"{name!r} is not a layer's digest")
        return self.folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        """Return whether a file of that digest is kept. It is not read, so `get` may find it damaged."""
        return self._file(name).exists()

    def get(self, name: str) -> dict[str, np.ndarray] | None:
        """Return a layer by digest, or None; a damaged file is removed."""
        file = self._file(name)
        tensors = self._read(file)
        if tensors is None:
            return None
        if digest(tensors) != name:
            log(WARNING, "the layer store held a damaged layer, %s; it is fetched again", file)
            file.unlink(missing_ok=True)
            return None
        return tensors

    @staticmethod
    def _read(file: Path) -> dict[str, np.ndarray] | None:
        try:
            tensors = load_file(file)
            with suppress(OSError):  # another user's file
                os.utime(file)  # used now: the last to be evicted
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            log(WARNING, "%s cannot be read and is removed: %s", file, error)
            with suppress(OSError):
                file.unlink(missing_ok=True)
            return None
        return tensors

    def put(self, name: str, tensors: Tensors, keep: Collection[str]) -> None:
        """Keep a layer. If the disk is full, log it and go on."""
        file = self._file(name)
        if file.exists():
            with suppress(OSError):
                os.utime(file)
            return
        self._write(file, tensors, 0o644)
        self._evict({self._file(digest) for digest in (name, *keep)})

    def _write(self, file: Path, tensors: Tensors, mode: int) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # the user may have cleared the cache
            with whole(file, shared=True) as beside:
                beside.touch(mode)
                save_tensors(beside, tensors)
        except (OSError, SafetensorError) as error:
            log(WARNING, "%s could not be kept: %s", file, error)

    def _evict(self, keep: Collection[Path]) -> None:
        found = []
        with suppress(OSError):  # another process may have evicted it
            for entry in os.scandir(self.folder):
                if OWN_NAME.fullmatch(entry.name):
                    with suppress(OSError):
                        status = entry.stat()
                        found.append((status.st_mtime, status.st_size, Path(entry.path)))
        total = sum(size for _, size, _ in found)
        now = time.time()
        for used, size, file in sorted(found):
            if file.suffix != ".safetensors":
                unwanted = used < now - LITTER_SECONDS
            elif file.name.startswith("own-"):  # nobody else has it
                unwanted = used < now - OWN_SECONDS and file not in keep
            else:
                unwanted = total > self.size and file not in keep
            if unwanted:
                with suppress(OSError):
                    file.unlink(missing_ok=True)
                    total -= size

    def _own_file(self, key: str) -> Path:
        # Hashed, since parts of the key come from messages.
        return self.folder / f"own-{content_digest(key)}.safetensors"

    def recall(self, key: str) -> dict[str, np.ndarray] | None:
        """Return the tensors that were remembered under a key, or None if they were evicted."""
        return self._read(self._own_file(key))

    def remember(self, key: str, tensors: Tensors) -> None:
        """Keep tensors under a key, and replace earlier ones; only this user may read them."""
        file = self._own_file(key)
        self._write(file, tensors, 0o600)
        self._evict({file})


def user_cache() -> Path:
    """Return this user's cache folder; its content can be made again.

    Raises
    ------
    ConfigError
        If the user has no home.
    """
    place = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if place.startswith("~"):
        raise ConfigError("this user has no home folder for a cache; set HOME or XDG_CACHE_HOME")
    return Path(place) / "layerfed"


def open_store(location: str = "", gigabytes: float = 20.0) -> LayerStore:
    """Return the store at a location, the same object for all calls in a process.

    Parameters
    ----------
    location : str
        A folder; or `memory` for this process's memory; or empty for the user's cache folder.
    gigabytes : float
        Largest size of a folder.

    Raises
    ------
    ConfigError
        If the folder cannot be written, or is of a user that does not exist.
    """
    if location == MEMORY:
        return _memory()
    folder = expanded(location) if location else user_cache() / "layers"
    return _folder(folder.resolve(), gigabytes * 1e9)


@lru_cache(maxsize=1)
def _memory() -> MemoryStore:
    return MemoryStore()


@lru_cache(maxsize=8)
def _folder(folder: Path, size: float) -> FolderStore:
    return FolderStore(folder, size)
