"""Files on the disk stay whole if the next write fails."""

from __future__ import annotations

import errno
import json
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from layerfed.config import ConfigError, load_config
from layerfed.runs import RunFolder, lock, read_lines
from layerfed.runs.files import NotWritten, append_line, write_json, write_lines, write_tensors
from layerfed.runs.records import RoundRecord

ROWS = [{"round": 1, "accuracy": 0.5}, {"round": 2, "accuracy": 0.75}]


def with_files_of_at_most(size: int, write: Callable[[], None]) -> str:
    """Write in a process whose files may not grow beyond `size`; return what it raised.

    The kernel then writes what fits and refuses the rest, as on a full disk.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        raised = ""
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            write()
        except NotWritten as error:
            raised = str(error)
        finally:
            os.write(writing, raised.encode())
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as stream:
        return stream.read()


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    file = tmp_path / "metrics.jsonl"
    for row in ROWS:
        append_line(file, row)
    return file


def test_lines_come_back_as_they_were_written(lines: Path) -> None:
    assert read_lines(lines) == ROWS
    assert lines.read_text().count("\n") == 2


@pytest.mark.parametrize("room", [0, 1, 10])
def test_a_line_that_does_not_fit_leaves_nothing_behind(lines: Path, room: int) -> None:
    before = lines.read_bytes()
    row = {"round": 3, "reason": "x" * 50}
    said = with_files_of_at_most(len(before) + room, lambda: append_line(lines, row))
    assert f"{lines} cannot be written: {os.strerror(errno.EFBIG)}" in said
    assert f"--resume {lines.parent}" in said
    assert lines.read_bytes() == before
    append_line(lines, row)
    assert read_lines(lines) == [*ROWS, row]


def test_a_half_written_line_is_left_out(lines: Path) -> None:
    with lines.open("a") as stream:
        stream.write('{"round": 3, "accur')
    assert read_lines(lines) == ROWS


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("summary.json", lambda file: write_json(file, {"status": "x" * 100})),
        ("ledger.jsonl", lambda file: write_lines(file, [{"round": 1, "clients": [0] * 100}])),
        ("m.safetensors", lambda file: write_tensors(file, {"w": np.ones(100, np.float32)})),
    ],
)
def test_a_file_that_does_not_fit_leaves_the_one_before(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    file = tmp_path / name
    file.write_text("before")
    assert "cannot be written" in with_files_of_at_most(20, lambda: write(file))
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {name: "before"}
    write(file)
    assert [f.name for f in tmp_path.iterdir()] == [name]
    assert file.read_bytes() != b"before"


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {"w": np.arange(6, dtype=np.float32).reshape(2, 3).T, "n": np.asarray(7)}
    write_tensors(tmp_path / "m.safetensors", tensors)
    found = load_file(tmp_path / "m.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
        assert found[name].shape == tensor.shape


# ----------------------------------------------------------------------------- the run's own folder
def test_a_run_holds_its_folder_until_it_ends(tmp_path: Path) -> None:
    config = load_config(None, [f"run.dir={tmp_path}", "run.name=a"])
    with (
        RunFolder.create(config, "inprocess"),
        pytest.raises(ConfigError, match="is being written by a run"),
    ):
        lock(tmp_path / "a")
    lock(tmp_path / "a").release()


def test_what_is_no_run_folder_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run folder of this machine"):
        lock(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_written_is_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("layerfed.files.os.replace", full)
    with pytest.raises(ConfigError, match=r"run\.dir = .* cannot be written: No space left"):
        RunFolder.create(load_config(None, [f"run.dir={tmp_path}"]), "inprocess")


def test_a_folder_that_cannot_say_how_it_ended_hides_no_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = RunFolder.create(load_config(None, [f"run.dir={tmp_path}", "run.name=a"]), "x")
    monkeypatch.setattr("layerfed.files.os.replace", full)
    with pytest.raises(ZeroDivisionError), folder:
        raise ZeroDivisionError
    assert json.loads((tmp_path / "a/summary.json").read_text())["status"] == "running"


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), "interrupted"), (SystemExit(0), "stopped"), (OSError("x"), "failed")],
)
def test_a_folder_says_how_its_run_ended(error: BaseException, status: str, tmp_path: Path) -> None:
    config = load_config(None, [f"run.dir={tmp_path}", "run.name=a"])
    with pytest.raises(type(error)), RunFolder.create(config, "x"):
        raise error
    assert json.loads((tmp_path / "a/summary.json").read_text())["status"] == status


def test_a_run_that_is_stopped_from_another_thread_stays_stopped(tmp_path: Path) -> None:
    folder = RunFolder.create(load_config(None, [f"run.dir={tmp_path}", "run.name=a"]), "x")
    with folder:
        stopping = threading.Thread(target=folder.stop)
        stopping.start()
        stopping.join()
        folder.on_round(RoundRecord(1))
        folder.finish("base", {})
    assert json.loads((tmp_path / "a/summary.json").read_text())["status"] == "stopped"
    assert not (tmp_path / "a/metrics.jsonl").exists(), "a round that ends after it is not written"


def test_a_run_that_is_over_cannot_be_stopped(tmp_path: Path) -> None:
    folder = RunFolder.create(load_config(None, [f"run.dir={tmp_path}", "run.name=a"]), "x")
    with folder:
        folder.finish("base", {})
    folder.stop()
    assert json.loads((tmp_path / "a/summary.json").read_text())["status"] == "completed"
