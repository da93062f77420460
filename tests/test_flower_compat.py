"""Flower still behaves as `layerfed.flower_compat` assumes."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from logging import ERROR
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.supercore import exit as flower_exit
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.inmemory_grid import InMemoryGrid
from flwr.superlink.routers.fleet.router import router

import layerfed
from layerfed import flower_compat
from layerfed.deploy.gateway import FLEET, REPEATABLE
from layerfed.engine import InProcessGrid
from layerfed.exchange import encode, record_of
from layerfed.flower_compat import (
    add_exit_handler,
    context_bytes,
    context_from,
    empty_run,
    engine_of,
    enter_run,
    enter_task,
    in_one_line,
    message_from,
    objects_of,
    stamp,
    task_identity,
    withdraw,
)
from layerfed.grids.ray import RayGrid

PACKAGE = Path(layerfed.__file__).parent


class Lines(logging.Handler):
    """Keeps the lines of Flower's log."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.shown.append(self.format(record))


@pytest.fixture
def lines() -> Iterator[list[str]]:
    handler, logger = Lines(), logging.getLogger("flwr")
    filters = list(logger.filters)
    logger.addHandler(handler)
    yield handler.shown
    logger.removeHandler(handler)
    logger.filters[:] = filters


def message() -> Message:
    return Message(RecordDict(), dst_node_id=7, message_type="train")


def grid() -> InProcessGrid:
    return InProcessGrid(lambda *_: None, 1, {})  # type: ignore[arg-type]


def test_messages_are_made_inside_a_run_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    with pytest.raises(RuntimeError, match="is not set"):
        message()
    enter_run()
    assert message().metadata.run_id == empty_run().run_id == 1


def test_a_message_takes_the_fields_that_a_grid_gives_it() -> None:
    made = message()
    assert made.metadata.message_id == ""
    stamp(made, message_id="a", src_node_id=3, reply_to_message_id="b")
    found = made.metadata
    assert (found.message_id, found.src_node_id, found.reply_to_message_id) == ("a", 3, "b")
    with pytest.raises(AttributeError, match="no identity"):
        stamp(made, identity="a")


def test_flower_reads_a_live_array_as_one_of_its_own() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    live = encode(values)
    np.testing.assert_array_equal(Array.inflate(live.deflate(), live.children).numpy(), values)

    class Other(type(live)):  # type: ignore[misc]
        pass

    other = Other(values)
    with pytest.raises(ValueError, match="Other"):  # or the name need not be changed any more
        Array.inflate(other.deflate(), other.children)


def test_a_message_and_its_context_pass_between_processes() -> None:
    made = message()
    made.content["config"] = ConfigRecord({"round": 3})
    made.content["arrays"] = record_of({"a": np.arange(4.0), "b": np.zeros((0, 2), np.int8)})
    stamp(made, message_id="m7")
    found = message_from(objects_of(made), "m7")
    assert vars(found.metadata) == vars(made.metadata)
    assert found.content["config"] == made.content["config"]
    for name, array in found.content.array_records["arrays"].items():
        np.testing.assert_array_equal(array.numpy(), made.content["arrays"][name].numpy())
    state = RecordDict({"own": MetricRecord({"limit": 2.0})})
    context = Context(1, 2, {"partition-id": 0}, state, {"run.seed": 3})
    assert vars(context_from(context_bytes(context))) == vars(context)


def test_an_error_passes_between_processes() -> None:
    made = Message(Error(5, "no room"), reply_to=message())
    assert message_from(objects_of(made), "").error.reason == "no room"


def test_a_process_takes_over_the_identity_of_a_task() -> None:
    before = task_identity()
    try:
        enter_task(5, 6, 7)
        assert task_identity() == (5, 6, 7)
        assert message().metadata.run_id == 5
    finally:
        enter_task(*before)


def test_grids_tell_what_clients_run_on() -> None:
    class HttpGrid:
        pass

    ours, flowers = object.__new__(RayGrid), object.__new__(InMemoryGrid)
    grids = [grid(), ours, flowers, HttpGrid()]
    assert [engine_of(g) for g in grids] == ["inprocess", "ray", "ray", "superlink"]  # type: ignore[arg-type]


def test_messages_are_taken_back_where_the_grid_can() -> None:
    ours = grid()
    identities = list(ours.push_messages([message()]))
    assert withdraw(ours, identities)
    assert list(ours.pull_messages(identities)) == []
    assert not withdraw(object.__new__(InMemoryGrid), identities)


def test_an_error_that_flower_logs_is_one_line(
    lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Flower ends the process by force some seconds later.
    monkeypatch.setattr(threading.Thread, "start", ignored)
    error = ValueError("too few clients")
    in_one_line(error)
    log(ERROR, "ServerApp raised %s", "ValueError", exc_info=error)
    with pytest.raises(SystemExit):
        flower_exit.flwr_exit(flower_exit.ExitCode.SERVERAPP_EXCEPTION, emit_telemetry=False)
    assert lines == ["error: too few clients"]


def ignored(*_: object, **__: object) -> None:
    """Do nothing."""


def test_the_gateway_lets_through_what_a_supernode_calls() -> None:
    served = {route.path.rpartition("/")[2] for route in router.routes}  # type: ignore[attr-defined]
    assert served - {"register-node", "unregister-node"} == set(FLEET)
    assert set(REPEATABLE) <= set(FLEET)


def test_exit_handlers_take_no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: list[object] = []
    monkeypatch.setattr(flower_exit.exit_handler, "registered_exit_handlers", handlers)
    called: list[int] = []
    add_exit_handler(lambda: called.append(1))
    flower_exit.exit_handler.trigger_exit_handlers(run_before_force_exit=False)
    assert called == [1]


def test_a_process_that_imports_it_imports_neither_torch_nor_ray() -> None:
    code = "import layerfed.flower_compat, sys; print({'torch', 'ray'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


PRIVATE = re.compile(
    r"from flwr\.(supercore|superlink|supernode|server|proto)\b|from flwr\.common\.(?!logger)|"
    r"__dict__\[f?\"_|getLogger\(\"flwr\"\)\.addFilter"
)


def test_private_parts_of_flower_are_touched_in_one_file() -> None:
    mine = Path(flower_compat.__file__)
    touched = [
        f"{file.relative_to(PACKAGE)}: {found[0]}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if file != mine and (found := PRIVATE.search(file.read_text(encoding="utf-8")))
    ]
    assert touched == []
    assert PRIVATE.search(mine.read_text(encoding="utf-8"))
