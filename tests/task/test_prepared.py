"""A machine's cache of small arrays: each is made once, and is either whole or made again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from layerfed.config import ConfigError
from layerfed.exchange import open_store
from layerfed.task.digits import Digits
from layerfed.task.prepared import MOST_FILES, prepared
from tests.task import hub

ARRAYS = {"indices": np.array([3, 1, 2]), "ends": np.array([[0.5]], dtype=np.float32)}


class Maker:
    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.times += 1
        return ARRAYS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/layerfed/prepared"


def same(found: dict[str, np.ndarray]) -> None:
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_it_is_made_once_for_each_key(cache: Path) -> None:
    maker = Maker()
    keys: list[dict[str, object]] = [
        {"seed": 1, "labels": np.array([0, 1])},
        {"seed": 2, "labels": np.array([0, 1])},
        {"seed": 1, "labels": np.array([1, 0])},
        {"seed": 1, "labels": np.array([0, 1], dtype=np.int32)},
        {"seed": "1", "labels": np.array([0, 1])},
    ]
    for times in (1, 2):
        for key in keys:
            same(prepared(key, maker))
        assert maker.times == len(keys), times
    assert len(list(cache.iterdir())) == len(keys)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_a_damaged_file_is_made_anew(cache: Path, damage: str) -> None:
    maker = Maker()
    prepared({"a": 1}, maker)
    (file,) = cache.iterdir()
    data = bytearray(file.read_bytes())
    data[data.index(np.int64(3).tobytes())] ^= 0x40
    damaged = {"cut": data[:-30], "flip": data, "empty": b"", "text": b"no archive"}
    file.write_bytes(bytes(damaged[damage]))
    same(prepared({"a": 1}, maker))
    assert maker.times == 2
    same(prepared({"a": 1}, maker))
    assert maker.times == 2


def test_where_nothing_can_be_written_it_is_made_each_time(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("in the way")
    maker = Maker()
    for times in (1, 2):
        same(prepared({"a": 1}, maker))
        assert maker.times == times


def test_without_a_home_it_is_made_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where nothing says a home
    maker = Maker()
    for times in (1, 2):
        same(prepared({"a": 1}, maker))
        assert maker.times == times
    with pytest.raises(ConfigError, match=r"no home folder .* set HOME or XDG_CACHE_HOME"):
        open_store()


def test_the_oldest_go_first(cache: Path) -> None:
    cache.mkdir(parents=True)
    for age in range(MOST_FILES):
        (cache / f"{age}.npz").touch()
        os.utime(cache / f"{age}.npz", (age, age))
    prepared({"a": 1}, Maker())
    left = {file.name for file in cache.iterdir()}
    assert len(left) == MOST_FILES
    assert "0.npz" not in left
    assert "1.npz" in left


def test_what_cannot_be_cut_is_refused_each_time(cache: Path) -> None:
    task = Digits(hub.config("federation.clients=400", "federation.clients-per-round=1"))
    for _ in range(2):
        with pytest.raises(ConfigError, match="leave some client with fewer than"):
            task.partition(0)


def test_a_second_process_finds_the_same_partition_and_images(cache: Path) -> None:
    script = """
import hashlib, json, sys
import numpy as np
from layerfed.task.digits import Digits
from layerfed.config import load_config
task = Digits(load_config(None, []))
digest = hashlib.blake2b()
for client in range(10):
    digest.update(task.partition(client).indices.tobytes())
digest.update(task.test_examples().store.tensors["image"].numpy().tobytes())
print(json.dumps([digest.hexdigest(), "datasets" in sys.modules]))
"""
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        found.append(json.loads(done.stdout))
    digest = found[0][0]
    assert found == [[digest, True], [digest, False]]
