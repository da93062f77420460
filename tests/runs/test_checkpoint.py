"""A checkpoint is complete or absent, and holds everything that a run needs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from layerfed.runs.checkpoint import Checkpoint, Checkpoints, latest_checkpoint, save_checkpoint
from layerfed.runs.records import RoundRecord


def checkpoint(server_round: int = 3) -> Checkpoint:
    return Checkpoint(
        server_round,
        "base",
        "token",
        layers={"w": np.full((2, 3), server_round, np.float32), "n": np.asarray(7)},
        state={"optimizer/first/w": np.zeros((2, 3), np.float32)},
    )


def rounds(folder: Path) -> list[str]:
    return sorted(place.name for place in (folder / "checkpoint").iterdir())


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(), keep=2)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.round, found.base, found.run_token) == (3, "base", "token")
    for part in ("layers", "state"):
        ours, theirs = getattr(checkpoint(), part), getattr(found, part)
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
            assert ours[name].dtype == theirs[name].dtype
            assert ours[name].shape == theirs[name].shape


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for server_round in (1, 2, 10, 11):
        save_checkpoint(tmp_path, checkpoint(server_round), keep=2)
    assert rounds(tmp_path) == ["round-000010", "round-000011"]


def test_a_run_without_any_has_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("file", ["layers.safetensors", "state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, file: str, damage: str) -> None:
    save_checkpoint(tmp_path, checkpoint(1), keep=2)
    place = save_checkpoint(tmp_path, checkpoint(2), keep=2) / file
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 0x40
    if damage == "gone":
        place.unlink()
    else:
        place.write_bytes(bytes(data) if damage == "flip" else bytes(data[:-9]))
    found = latest_checkpoint(tmp_path)
    assert found is not None
    # A flipped bit of the index may fall on the token, which no digest covers.
    assert found.round == 1 or (file, damage) == ("state.json", "flip")


def test_one_that_was_being_written_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, checkpoint(1), keep=2)

    def killed(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("layerfed.files.os.replace", killed)
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(tmp_path, checkpoint(2), keep=1)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.round == 1
    assert rounds(tmp_path) == ["round-000001"], "half a checkpoint takes no room"
    (tmp_path / "checkpoint/.round-000002.tmp").mkdir()  # as of a process that was killed
    save_checkpoint(tmp_path, checkpoint(2), keep=1)
    assert rounds(tmp_path) == ["round-000002"], "what was left half-written is gone"


def test_they_are_written_every_so_often_and_at_the_end(tmp_path: Path) -> None:
    now = [0]
    observer = Checkpoints(tmp_path, lambda: checkpoint(now[0]), every=3, keep=9)
    for now[0] in range(1, 9):
        observer.on_round(RoundRecord(now[0]))
    observer.on_end(RoundRecord(8))
    assert rounds(tmp_path) == ["round-000003", "round-000006", "round-000008"]


def test_one_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_text("in the way")
    observer = Checkpoints(tmp_path, checkpoint, every=1, keep=1)
    observer.on_round(RoundRecord(3))
    assert (tmp_path / "checkpoint").read_text() == "in the way"


def test_its_index_can_be_read_by_people(tmp_path: Path) -> None:
    place = save_checkpoint(tmp_path, checkpoint(), keep=1)
    index = json.loads((place / "state.json").read_text())
    assert set(index) == {"round", "base", "data", "run_token", "digests"}
