"""What one side writes the other reads, and no reply, however forged, does more than be refused."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from layerfed.exchange import (
    Description,
    GlobalModel,
    RefusedReply,
    describe_reply,
    evaluate_reply,
    instruction,
    probe_reply,
    read_description,
    read_evaluation,
    read_manifest,
    read_mask,
    read_statistics,
    read_train_reply,
    train_reply,
)
from layerfed.exchange.messages import MAX_EXAMPLES, decode, encode
from layerfed.layers import LayerMap
from tests.conftest import BLOCKS, TinyNet

SHAPE, DTYPE = (3, 4), np.dtype(np.float32)
EXPECTED: dict[str, np.ndarray] = {
    "w": np.zeros(SHAPE, DTYPE),
    "count": np.zeros((), np.int64),
}


def ask(kind: str = "train", **config: Any) -> Message:
    return instruction(kind, 7, server_round=3, timeout=60.0, **config)


def update(**changes: np.ndarray) -> dict[str, np.ndarray]:
    values = np.arange(12, dtype=np.float32).reshape(SHAPE)
    return {"w": values, "count": np.asarray(5, dtype=np.int64), **changes}


def over_the_wire(message: Message) -> Message:
    """Serialise and parse, as between two machines."""
    return message_from_proto(message_to_proto(message))


def reply_with(array: Array, examples: float = 9, **metrics: float) -> Message:
    """A training reply whose tensor `w` is the given array, well-formed otherwise."""
    content = RecordDict(
        {
            "arrays": ArrayRecord({"w": array, "count": encode(EXPECTED["count"])}),
            "metrics": MetricRecord({"examples": examples, "loss": 0.5, **metrics}),
        }
    )
    return Message(content, reply_to=ask())


def raw(data: bytes, stype: str = "numpy.ndarray") -> Array:
    """An array that claims to be the right one, whatever its bytes are."""
    return Array(str(DTYPE), SHAPE, stype, data)


def npy(values: np.ndarray, **kwargs: Any) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, values, **kwargs)
    return stream.getvalue()


def with_header(header: str, body: bytes = bytes(48), version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin1")
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + body


def header(descr: str = "'<f4'", order: str = "False", shape: str = "(3, 4)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


# --------------------------------------------------------------------------------- round trips
def test_an_instruction_brings_mask_manifest_and_changed_arrays(
    tiny: torch.nn.Module, layers: LayerMap
) -> None:
    model = GlobalModel(layers, ArrayRecord(tiny.state_dict()))
    head = {name: values + 1 for name, values in model.layer("head").items()}
    model.replace("head", head)
    mask = [0, 1, 0, 1]
    sent = ask(manifest=model.manifest(), arrays=model.payload(), mask=mask, lr=0.5)

    message = over_the_wire(sent)
    manifest, arrays = read_manifest(message)
    assert manifest == model.manifest()
    assert set(arrays) == set(layers["head"].tensors)
    for name, values in head.items():
        found = decode(arrays[name], values.shape, values.dtype)
        np.testing.assert_array_equal(found, values)
    assert read_mask(message, layers) == (False, True, False, True)
    assert message.content.config_records["config"]["lr"] == 0.5
    assert message.content.config_records["config"]["round"] == 3
    assert message.metadata.dst_node_id == 7


def test_an_instruction_without_arrays_reads_as_no_arrays(
    tiny: torch.nn.Module, layers: LayerMap
) -> None:
    model = GlobalModel(layers, ArrayRecord(tiny.state_dict()))
    manifest, arrays = read_manifest(ask("evaluate", manifest=model.manifest()))
    assert manifest == model.manifest()
    assert len(arrays) == 0


@pytest.mark.parametrize("length", [0, BLOCKS - 1, BLOCKS + 1])
def test_a_mask_over_another_number_of_layers_is_an_error(length: int) -> None:
    layers = LayerMap.from_model(TinyNet())
    with pytest.raises(ValueError, match=f"over {length} layers, this model has {BLOCKS}"):
        read_mask(ask(mask=[1] * length), layers)


@pytest.mark.parametrize(
    "description",
    [
        Description(4, 100),
        Description(0, 1, budget=0.0),
        Description(4, 100, budget=2.5, partitions=10),
    ],
)
def test_a_description_arrives_as_it_was_sent(description: Description) -> None:
    reply = over_the_wire(describe_reply(ask("query.describe"), description))
    assert read_description(reply) == description


def test_statistics_arrive_as_they_were_sent() -> None:
    sent = {"snr": [0.0, 1.5, 2.0], "grad_norm_sq": [1e-30, 3.0, 1e30]}
    reply = over_the_wire(probe_reply(ask("query.probe"), sent, 9, flops=8.0))
    found, metrics = read_statistics(reply, ["grad_norm_sq", "snr"], 3)
    assert list(found) == ["grad_norm_sq", "snr"]
    for name, row in sent.items():
        assert found[name].tolist() == row
    assert metrics == {"examples": 9.0, "flops": 8.0}


def test_a_training_reply_arrives_bit_by_bit() -> None:
    sent = update()
    reply = over_the_wire(train_reply(ask(), sent, 9, loss=0.5, flops=8.0))
    found = read_train_reply(reply, EXPECTED)
    assert found.examples == 9
    assert found.metrics == {"examples": 9.0, "loss": 0.5, "flops": 8.0}
    assert set(found.update) == set(sent)
    for name, values in sent.items():
        np.testing.assert_array_equal(found.update[name], values)
        assert found.update[name].dtype == values.dtype
        assert found.update[name].shape == values.shape


def test_an_evaluation_arrives_as_it_was_sent() -> None:
    reply = over_the_wire(evaluate_reply(ask("evaluate"), 12, loss=0.25, accuracy=0.75))
    examples, metrics = read_evaluation(reply)
    assert examples == 12
    assert (metrics["loss"], metrics["accuracy"]) == (0.25, 0.75)


def test_updates_in_any_memory_order_are_written_row_major() -> None:
    values = np.asfortranarray(update()["w"])
    found = read_train_reply(train_reply(ask(), update(w=values), 9, loss=0.5), EXPECTED)
    np.testing.assert_array_equal(found.update["w"], values)


# ------------------------------------------------------------------------- tensors not asked for
def refused(message: Message, expected: Mapping[str, np.ndarray] = EXPECTED) -> str:
    with pytest.raises(RefusedReply) as caught:
        read_train_reply(message, expected)
    return str(caught.value)


def test_extra_and_missing_tensors_are_refused() -> None:
    extra = update(embed=np.zeros(2, np.float32))
    assert "not asked to train: embed" in refused(train_reply(ask(), extra, 9, loss=0.5))
    few = {"count": update()["count"]}
    assert "lacks tensors it was asked to train: w" in refused(train_reply(ask(), few, 9, loss=0.5))
    no_arrays = evaluate_reply(ask(), 9, loss=0.5)
    assert "lacks tensors it was asked to train: count, w" in refused(no_arrays)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((4, 3), np.float32),
        np.zeros(12, np.float32),
        np.zeros((1, 3, 4), np.float32),
        np.zeros((3, 5), np.float32),
        np.zeros((), np.float32),
        np.zeros((0, 4), np.float32),
    ],
    ids=lambda v: str(v.shape),
)
def test_another_shape_is_refused(values: np.ndarray) -> None:
    says = refused(train_reply(ask(), update(w=values), 9, loss=0.5))
    assert says.startswith("'w' is an array of ")
    assert "(3, 4) is due" in says


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.float16, ">f4", np.complex64, "S4"])
def test_another_dtype_is_refused(dtype: Any) -> None:
    values = np.zeros(SHAPE, dtype)
    assert "float32(3, 4) is due" in refused(train_reply(ask(), update(w=values), 9, loss=0.5))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_refused(value: float) -> None:
    values = update()["w"]
    values[2, 3] = value
    assert refused(train_reply(ask(), update(w=values), 9, loss=0.5)) == "'w' holds NaN or Inf"


# ---------------------------------------------------------------------------- forged npy arrays
VALID = npy(update()["w"])
FORGED = {
    "empty": b"",
    "no magic": b"PK\x03\x04" + VALID[4:],
    "cut in the magic": VALID[:5],
    "cut in the length": VALID[:9],
    "cut in the header": VALID[:40],
    "cut in the values": VALID[:-1],
    "no values": VALID[:-48],
    "bytes after the values": VALID + b"\0",
    "version 2": npy(update()["w"], version=(2, 0)),
    "version 3": npy(update()["w"], version=(3, 0)),
    "version 9": b"\x93NUMPY\x09\x00" + VALID[8:],
    "huge shape": with_header(header(shape="(1000000, 1000000)")),
    "shape beyond 64 bits": with_header(header(shape=f"({2**40}, {2**40})")),
    "negative shape": with_header(header(shape="(-3, -4)")),
    "fractional shape": with_header(header(shape="(3.0, 4)")),
    "list for a shape": with_header(header(shape="[3, 4]")),
    "column-major": with_header(header(order="True")),
    "order of 0": with_header(header(order="0")),
    "pickled objects": npy(np.array([[print] * 4] * 3, dtype=object), allow_pickle=True),
    "object header": with_header(header(descr="'|O'")),
    "structured": with_header(header(descr="[('a', '<f4')]")),
    "no such dtype": with_header(header(descr="'<f99'")),
    "empty descr": with_header(header(descr="()")),
    "code for a descr": with_header(header(descr="__import__('os')")),
    "missing key": with_header("{'descr': '<f4', 'shape': (3, 4)}"),
    "extra key": with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), 'x': 1}"),
    "keys of two kinds": with_header("{1: 1, 'a': 2}"),
    "unhashable key": with_header("{[]: 1}"),
    "no dictionary": with_header("[1, 2]"),
    "open bracket": with_header(header()[:-3]),
    "open string": with_header("'''"),
    "deep": with_header("-" * 3900 + "1"),
    "deep brackets": with_header("(" * 3900),
    "null bytes": with_header("\0" * 60),
    "header of 64 KiB": with_header(header() + " " * 60_000),
}


@pytest.mark.parametrize("data", FORGED.values(), ids=FORGED.keys())
def test_a_forged_array_is_refused(data: bytes) -> None:
    says = refused(reply_with(raw(data)))
    assert says.startswith("'w' is an array ")


def test_the_same_array_unforged_is_taken() -> None:
    """Or the forgeries above could be refused for another reason."""
    for data in (VALID, with_header(header(), VALID[-48:])):
        found = read_train_reply(reply_with(raw(data)), EXPECTED)
        np.testing.assert_array_equal(found.update["w"], update()["w"])


def test_another_serialisation_is_refused() -> None:
    assert "'w' is an array" in refused(reply_with(raw(VALID, stype="pickle")))


def test_what_an_array_says_of_itself_beside_its_bytes_is_not_believed() -> None:
    liar = Array("float32", (3, 4), "numpy.ndarray", npy(np.zeros((3, 5), np.float32)))
    assert "float32(3, 5) where float32(3, 4) is due" in refused(reply_with(liar))


def test_reading_allocates_no_more_than_the_reply_brought() -> None:
    """The update is a view of the bytes that came, and cannot be written to."""
    found = read_train_reply(reply_with(raw(VALID)), EXPECTED).update["w"]
    assert not found.flags.owndata
    assert not found.flags.writeable


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_and_nothing_else(data: bytes) -> None:
    for forged in (data, b"\x93NUMPY" + data, b"\x93NUMPY\x01\x00" + data):
        with pytest.raises(RefusedReply):
            decode(raw(forged), SHAPE, DTYPE)


PIECES = st.sampled_from(
    [
        *"{}()[]'\",:-+.\\\n #LOfjb0123",
        "'descr'",
        "'fortran_order'",
        "'shape'",
        "'<f4'",
        "'|O'",
        "False",
        "True",
        "None",
        "(3, 4)",
        "**",
        "'''",
        "lambda",
    ]
)


@settings(deadline=None, max_examples=300)
@given(st.lists(PIECES, max_size=40).map("".join) | st.text(st.characters(max_codepoint=255)))
def test_any_header_text_is_refused_and_nothing_else(text: str) -> None:
    with pytest.raises(RefusedReply):
        decode(raw(with_header(text)), SHAPE, DTYPE)


@settings(deadline=None, max_examples=300)
@given(st.integers(0, len(VALID) - 1), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_changes_one_value(position: int, flip: int) -> None:
    forged = bytearray(VALID)
    forged[position] ^= flip
    try:
        found = decode(raw(bytes(forged)), SHAPE, DTYPE)
    except RefusedReply:
        assert position < len(VALID) - 48, "every 4 bytes are some float32"
    else:
        assert found.shape == SHAPE
        assert found.dtype == DTYPE
        assert (found.view(np.uint32) != update()["w"].view(np.uint32)).sum() == (
            position >= len(VALID) - 48
        )


# ------------------------------------------------------------------------------ counts and metrics
@pytest.mark.parametrize("examples", [0, -1, 2**40, MAX_EXAMPLES + 1, 0.5, 1.5, np.nan, np.inf])
def test_forged_example_counts_are_refused_by_every_reader(examples: float) -> None:
    """d_i is a client's weight in the mean, and it states it itself."""
    readers = [
        (reply_with(raw(VALID), examples), lambda m: read_train_reply(m, EXPECTED)),
        (
            probe_reply(ask(), {"snr": [1.0]}, examples),  # type: ignore[arg-type]
            lambda m: read_statistics(m, ["snr"], 1),
        ),
        (
            evaluate_reply(ask(), examples, loss=0.1, accuracy=0.1),  # type: ignore[arg-type]
            read_evaluation,
        ),
        (
            describe_reply(ask(), Description(0, examples)),  # type: ignore[arg-type]
            read_description,
        ),
    ]
    for message, read in readers:
        with pytest.raises(RefusedReply, match="examples"):
            read(message)


@pytest.mark.parametrize("examples", [1, MAX_EXAMPLES])
def test_counts_up_to_the_limit_are_taken(examples: int) -> None:
    assert read_train_reply(reply_with(raw(VALID), examples), EXPECTED).examples == examples


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_any_metric_that_is_not_finite_is_refused(value: float) -> None:
    assert "not finite: loss" in refused(reply_with(raw(VALID), loss=value))
    assert "not finite: flops" in refused(reply_with(raw(VALID), flops=value))


def test_missing_metrics_are_named() -> None:
    message = reply_with(raw(VALID))
    del message.content["metrics"]
    assert refused(message) == "it has no 'metrics' record"
    message.content["metrics"] = MetricRecord({"examples": 9})
    assert refused(message) == "its metrics lack loss"
    message.content["metrics"] = MetricRecord({"examples": [9, 9], "loss": 0.5})
    assert refused(message) == "its metrics lack examples"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"partition": -1}, "'partition' -1"),
        ({"partition": 0.5}, "'partition' 0.5"),
        ({"partitions": -2}, "'partitions' -2"),
        ({"budget": -1.0}, "budget of -1"),
        ({"budget": np.nan}, "not finite: budget"),
        ({"budget": np.inf}, "not finite: budget"),
    ],
)
def test_impossible_descriptions_are_refused(wrong: dict[str, float], says: str) -> None:
    metrics = MetricRecord({"partition": 0, "examples": 5, **wrong})
    message = Message(RecordDict({"metrics": metrics}), reply_to=ask())
    with pytest.raises(RefusedReply, match=says):
        read_description(message)


def described(costs: Any, depth: Any) -> Message:
    metrics = {"partition": 0, "examples": 5, "costs": costs, "depth_costs": depth}
    given_rows = {name: value for name, value in metrics.items() if value is not None}
    return Message(RecordDict({"metrics": MetricRecord(given_rows)}), reply_to=ask())


def test_measured_costs_arrive_as_they_were_sent() -> None:
    description = Description(4, 100, costs=(1.0, 0.0, 2.5), depth_costs=(3.0, 3.0, 0.0))
    reply = over_the_wire(describe_reply(ask("query.describe"), description))
    assert read_description(reply, 3) == description


@pytest.mark.parametrize(
    ("costs", "depth"),
    [
        ([1.0] * 3, [2.0, 1.0]),
        ([1.0] * 2, [2.0, 1.0, 0.0]),
        ([1.0] * 4, [0.0] * 4),
        ([1.0] * 3, None),
        (None, [2.0, 1.0, 0.0]),
        (1.0, [2.0, 1.0, 0.0]),
        ([1.0, -1.0, 1.0], [2.0, 1.0, 0.0]),
        ([1.0, np.nan, 1.0], [2.0, 1.0, 0.0]),
        ([1.0] * 3, [np.inf, 1.0, 0.0]),
        ([1.0] * 3, [1.0, 0.0, -1.0]),
        ([1.0] * 3, [1.0, 2.0, 0.0]),
    ],
    ids=str,
)
def test_measured_costs_of_wrong_length_or_impossible_value_are_refused(
    costs: Any, depth: Any
) -> None:
    with pytest.raises(RefusedReply, match="costs'"):
        read_description(described(costs, depth), 3)


# ---------------------------------------------------------------------------------- statistics
@pytest.mark.parametrize(
    "row",
    [
        [],
        [1.0, 2.0],
        [1.0] * 4,
        [1.0, -1e-9, 2.0],
        [1.0, np.nan, 2.0],
        [np.inf, 1.0, 1.0],
        [1.0, 1e308, 1.0],
    ],
    ids=str,
)
def test_statistics_of_wrong_length_or_impossible_value_are_refused(row: list[float]) -> None:
    message = probe_reply(ask("query.probe"), {"snr": [1.0] * 3, "grad_norm_sq": row}, 9)
    with pytest.raises(RefusedReply, match="'grad_norm_sq'"):
        read_statistics(message, ["snr", "grad_norm_sq"], 3)


def test_statistics_that_are_missing_or_a_single_number_are_refused() -> None:
    message = probe_reply(ask("query.probe"), {"snr": [1.0] * 3}, 9)
    with pytest.raises(RefusedReply, match="'grad_norm_sq' is not a list of 3 numbers"):
        read_statistics(message, ["snr", "grad_norm_sq"], 3)
    message.content["statistics"] = MetricRecord({"snr": 3.0})
    with pytest.raises(RefusedReply, match="'snr' is not a list of 3 numbers"):
        read_statistics(message, ["snr"], 3)
    del message.content["statistics"]
    with pytest.raises(RefusedReply, match="no 'statistics' record"):
        read_statistics(message, ["snr"], 3)


def test_statistics_nobody_asked_for_are_ignored() -> None:
    message = probe_reply(ask("query.probe"), {"snr": [1.0], "other": [-1.0, 2.0]}, 9)
    found, _ = read_statistics(message, ["snr"], 1)
    assert list(found) == ["snr"]
