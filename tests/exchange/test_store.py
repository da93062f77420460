"""The layer store returns the layers that were put in, or None, whatever happens to its files."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from layerfed.config import ConfigError
from layerfed.digests import digest
from layerfed.exchange import FolderStore, LayerStore, MemoryStore, open_store

KB = 1000


def layer(seed: int, elements: int = 200) -> tuple[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    tensors = {
        "w": rng.standard_normal(elements).astype(np.float32),
        "count": np.asarray(seed, dtype=np.int64),
    }
    return digest(tensors), tensors


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> LayerStore:
    return MemoryStore() if request.param == "memory" else FolderStore(tmp_path, 1e9)


@pytest.fixture
def folder(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "layers", 1e9)


def kept(store: FolderStore) -> set[str]:
    return {file.stem for file in store.folder.glob("*.safetensors")}


def test_a_layer_comes_back_bit_for_bit(store: LayerStore) -> None:
    name, tensors = layer(1)
    assert not store.has(name)
    assert store.get(name) is None
    store.put(name, tensors, keep=[])
    assert store.has(name)
    found = store.get(name)
    assert found is not None
    assert set(found) == set(tensors)
    for key, values in tensors.items():
        np.testing.assert_array_equal(found[key], values)
        assert found[key].dtype == values.dtype


def test_what_is_remembered_comes_back_and_is_replaced(store: LayerStore) -> None:
    assert store.recall("run/0/head") is None
    for value in (1.0, 2.0):
        store.remember("run/0/head", {"w": np.full(3, value, np.float32)})
        found = store.recall("run/0/head")
        assert found is not None
        assert found["w"].tolist() == [value] * 3


def test_memory_keeps_the_current_version_only() -> None:
    store = MemoryStore()
    (a, first), (b, second) = layer(1), layer(2)
    store.put(a, first, keep=[a])
    store.put(b, second, keep=[b])
    assert store.has(b)
    assert not store.has(a)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "garbage"])
def test_a_damaged_layer_is_as_good_as_none(folder: FolderStore, damage: str) -> None:
    name, tensors = layer(1)
    folder.put(name, tensors, keep=[])
    file = folder.folder / f"{name}.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    content = {"flip": bytes(data), "cut": bytes(data[:-7]), "empty": b"", "garbage": b"\xff" * 99}
    file.write_bytes(content[damage])
    assert folder.get(name) is None
    assert not file.exists(), "it is gone, so that the layer is asked for again"
    folder.put(name, tensors, keep=[])
    assert folder.get(name) is not None


def test_a_file_of_another_layer_is_not_believed(folder: FolderStore) -> None:
    (a, first), (b, _) = layer(1), layer(2)
    folder.put(a, first, keep=[])
    os.replace(folder.folder / f"{a}.safetensors", folder.folder / f"{b}.safetensors")
    assert folder.get(b) is None


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "A" * 32, "a" * 31, "a" * 33, "a/" * 16])
def test_a_name_from_a_message_is_never_a_path(folder: FolderStore, name: str) -> None:
    for use in (folder.has, folder.get, lambda n: folder.put(n, {}, keep=[])):
        with pytest.raises(ValueError, match="is not a layer's digest"):
            use(name)


def test_keys_of_any_text_stay_inside_the_folder(folder: FolderStore) -> None:
    folder.remember("../../evil/0/head", {"w": np.zeros(1)})
    assert {f.parent for f in folder.folder.rglob("*")} == {folder.folder}


def test_the_least_recently_used_goes_first_and_what_is_needed_stays(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, 4 * KB)
    layers = [layer(seed) for seed in range(6)]  # about 1 kB each
    needed, recent = layers[0][0], layers[1][0]
    for position, (name, tensors) in enumerate(layers[:4]):
        store.put(name, tensors, keep=[needed])
        os.utime(store.folder / f"{name}.safetensors", (position, position))
    assert store.get(recent) is not None  # used now
    for name, tensors in layers[4:]:
        store.put(name, tensors, keep=[needed])
    assert {needed, recent, layers[5][0]} <= kept(store)
    assert layers[2][0] not in kept(store)
    assert sum(f.stat().st_size for f in store.folder.glob("*.safetensors")) <= 4 * KB


def test_what_is_put_in_once_more_is_used_now(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, 3 * KB)
    layers = [layer(seed) for seed in range(4)]
    for position, (name, tensors) in enumerate(layers[:3]):
        store.put(name, tensors, keep=[])
        os.utime(store.folder / f"{name}.safetensors", (position, position))
    store.put(*layers[0], keep=[])
    store.put(*layers[3], keep=[])
    assert layers[0][0] in kept(store)
    assert layers[1][0] not in kept(store)


def test_what_the_round_needs_is_kept_even_beyond_the_limit(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, 1 * KB)
    layers = [layer(seed) for seed in range(4)]
    names = [name for name, _ in layers]
    for name, tensors in layers:
        store.put(name, tensors, keep=names)
    assert kept(store) == set(names)


def test_litter_of_killed_writers_is_cleared_and_of_living_ones_is_not(folder: FolderStore) -> None:
    old, new = (folder.folder / f".{n * 32}.safetensors.{n * 32}.tmp" for n in "12")
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    name, tensors = layer(1)
    folder.put(name, tensors, keep=[])
    assert not old.exists()
    assert new.exists()


def test_a_full_disk_is_no_error(folder: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    name, tensors = layer(1)
    monkeypatch.setattr("layerfed.exchange.store.save_tensors", full)
    folder.put(name, tensors, keep=[])
    assert not folder.has(name)
    assert kept(folder) == set()


def test_a_folder_that_cannot_be_made_is_an_error_that_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/layers cannot be written.*exchange\.store"):
        FolderStore(tmp_path / "file" / "layers", 1e9)


def test_who_sees_the_same_folder_sees_the_same_store(tmp_path: Path) -> None:
    here, there = FolderStore(tmp_path / "a", 1e9), FolderStore(tmp_path / "a", 5e9)
    assert here.identity == there.identity
    assert FolderStore(tmp_path / "b", 1e9).identity != here.identity
    assert MemoryStore().identity != MemoryStore().identity


def test_a_disk_without_hard_links_gives_an_identity_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refused)
    found = [FolderStore(tmp_path, 1e9).identity for _ in range(2)]
    assert found[0] == found[1]
    assert len(found[0]) == 32


def test_one_location_is_one_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_store(str(tmp_path), 1.0) is open_store(str(tmp_path), 1.0)
    assert open_store("memory", 1.0) is open_store("memory", 2.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    default = open_store()
    assert isinstance(default, FolderStore)
    assert default.folder == tmp_path / "layerfed" / "layers"


# ------------------------------------------------------------------------- many processes at once
def hammer(folder: Path, seed: int, failures: multiprocessing.Queue) -> None:
    store = FolderStore(folder, 6 * KB)  # small, so that each evicts what the others use
    rng = np.random.default_rng(seed)
    try:
        for _ in range(150):
            name, tensors = layer(int(rng.integers(12)))
            found = store.get(name)
            if found is None:
                store.put(name, tensors, keep=[name])
            else:
                assert digest(found) == name
            store.remember("shared", {"w": np.full(50, seed, np.float32)})
            mine = store.recall("shared")
            assert mine is None or len(set(mine["w"].tolist())) == 1, "half of each"
        failures.put(store.identity)
    except BaseException as error:
        failures.put(f"{type(error).__name__}: {error}")


def test_processes_that_write_read_and_evict_at_once_never_see_a_broken_layer(
    tmp_path: Path,
) -> None:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue = context.Queue()
    workers = [context.Process(target=hammer, args=(tmp_path, i, results)) for i in range(3)]
    for worker in workers:
        worker.start()
    identities = {results.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join(timeout=30)
    assert identities == {FolderStore(tmp_path, 1e9).identity}
    assert not list(tmp_path.glob("*.tmp"))


def test_the_folder_of_an_unknown_user_is_refused() -> None:
    with pytest.raises(ConfigError, match="'~nobody-here/x': there is no user 'nobody-here'"):
        open_store("~nobody-here/x")


def test_a_store_touches_no_file_of_others(tmp_path: Path) -> None:
    names = ("clinic-a.key", ".bashrc", "model.safetensors", "data.csv", "x.tmp")
    for name in names:
        (tmp_path / name).write_bytes(bytes(4 * KB))
        os.utime(tmp_path / name, (0, 0))
    litter = tmp_path / f".{'0' * 32}.safetensors.{'1' * 32}.tmp"
    litter.touch()
    os.utime(litter, (0, 0))
    store = FolderStore(tmp_path, 1)
    layer = {"x": np.zeros(4, np.float32)}
    for key in ("a", "b"):
        store.put(digest({"x": layer["x"] + ord(key)}), {"x": layer["x"] + ord(key)}, ())
    assert all((tmp_path / name).exists() for name in names)
    assert not litter.exists()
    assert len(list(tmp_path.glob("?" * 32 + ".safetensors"))) == 1


def test_a_layer_whose_file_is_another_users_is_read_and_kept(
    folder: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may read a file need not be allowed to set its time."""

    def refuse(file: Path) -> None:
        raise PermissionError(1, "Operation not permitted", file)

    name, tensors = layer(1)
    folder.put(name, tensors, keep=[])
    monkeypatch.setattr(os, "utime", refuse)
    folder.put(name, tensors, keep=[])
    assert folder.get(name) is not None
    assert kept(folder) == {name}


def test_what_a_client_remembers_is_not_evicted_for_layers(tmp_path: Path) -> None:
    """Nobody else has its personal layers; a month later the run is over."""
    store = FolderStore(tmp_path, 1)
    store.remember("run/0", {"x": np.ones(4, np.float32)})
    [file] = tmp_path.glob("own-*")
    os.utime(file, (0, time.time() - 86400))
    values = {"x": np.zeros(4, np.float32)}
    store.put(digest(values), values, ())
    assert store.recall("run/0") is not None
    os.utime(file, (0, time.time() - 40 * 86400))
    values = {"x": np.full(4, 2, np.float32)}
    store.put(digest(values), values, ())
    assert store.recall("run/0") is None
