"""A failed write leaves the old file unchanged, and no temporary file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from layerfed.files import create, whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("flush", [False, True])
def test_a_file_takes_the_place_of_the_one_before(
    tmp_path: Path, shared: bool, flush: bool
) -> None:
    file = tmp_path / "a.txt"
    for text in ("one", "two"):
        with whole(file, shared=shared, durable=flush) as beside:
            beside.write_text(text)
            assert not file.exists() or file.read_text() == "one"
        assert file.read_text() == text
        assert names(tmp_path) == ["a.txt"]


def test_a_folder_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    place = tmp_path / "round-1"
    for name in ("old", "new"):
        with whole(place, durable=True) as beside:
            beside.mkdir()
            (beside / name).write_text(name)
        assert names(place) == [name]


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")

    def fail() -> None:
        with whole(file) as beside:
            beside.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert file.read_text() == "before"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "round-1"
    place.mkdir()
    (place / "old").touch()
    before = os.replace

    def fails(source: Path, target: Path) -> None:
        if Path(source).suffix == ".tmp":
            raise OSError("no")
        before(source, target)

    monkeypatch.setattr(os, "replace", fails)

    def write() -> None:
        with whole(place) as beside:
            beside.mkdir()

    with pytest.raises(OSError, match="no"):
        write()
    assert names(place) == ["old"]
    assert names(tmp_path) == ["round-1"]


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    for text in ("half", "whole"):
        with whole(tmp_path / "a") as beside:
            beside.write_text(text)
            left = beside
    left.mkdir()
    (left / "half").write_text("")
    with whole(tmp_path / "a") as beside:
        beside.write_text("whole again")
    assert names(tmp_path) == ["a"]


def test_two_writers_of_a_shared_place_do_not_meet(tmp_path: Path) -> None:
    file = tmp_path / "a"
    with whole(file, shared=True) as one, whole(file, shared=True) as two:
        one.write_text("one")
        two.write_text("two")
    assert file.read_text() == "one"  # renamed last


def test_flushed_content_is_on_the_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        "layerfed.files.os.fsync",
        lambda fd: (done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), sync(fd))[1],
    )
    monkeypatch.setattr(
        "layerfed.files.os.replace", lambda a, b: (done.append("rename"), replace(a, b))[1]
    )
    with whole(tmp_path / "c", durable=True) as beside:
        beside.mkdir()
        (beside / "file").write_text("x")
    assert done == ["file", ".c.tmp", "rename", tmp_path.name]


def test_a_new_file_has_its_mode_and_is_never_replaced(tmp_path: Path) -> None:
    file = tmp_path / "key"
    create(file, b"secret", 0o600)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        create(file, b"other", 0o600)
    assert file.read_bytes() == b"secret"
