"""An array is serialised only if it leaves the process, and is then Flower's own `Array`."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given
from hypothesis.extra import numpy as hnp

from layerfed.exchange import RefusedReply, encode, record_of
from layerfed.exchange.arrays import LazyArray, LiveArray, carried_bytes, decode, moved_bytes


@given(hnp.arrays(hnp.floating_dtypes(sizes=(32, 64)), hnp.array_shapes(min_dims=0, max_dims=3)))
def test_its_bytes_are_those_flower_writes(values: np.ndarray) -> None:
    assert encode(values).data == Array(np.asarray(values)).data


def test_nothing_is_serialised_until_it_is_asked_for() -> None:
    values = np.arange(6.0)
    array = encode(values)
    assert isinstance(array, LiveArray)
    assert array._data is None
    assert np.shares_memory(decode(array, (6,), np.dtype(float)), values)


def test_a_record_keeps_the_arrays_as_they_are() -> None:
    values = np.arange(6.0)
    content = RecordDict({"arrays": record_of({"w": values})})
    array = content.array_records["arrays"]["w"]
    assert np.shares_memory(decode(array, (6,), np.dtype(float)), values)


def test_once_serialised_there_is_one_copy() -> None:
    values = np.arange(6, dtype=np.float32)
    array = encode(values)
    data = array.data
    assert array.data is data
    found = decode(array, (6,), np.dtype(np.float32))
    assert not np.shares_memory(found, values)
    np.testing.assert_array_equal(found, values)


def test_it_is_read_only_and_leaves_the_original_writeable() -> None:
    values = np.zeros(3)
    array = encode(values)
    with pytest.raises(ValueError, match="read-only"):
        decode(array, (3,), np.dtype(float))[0] = 1
    values[0] = 1
    copy = array.numpy()
    copy[1] = 2
    assert values.tolist() == [1, 0, 0]


def test_an_array_that_is_read_where_it_is_held_is_read_only_too() -> None:
    held = np.zeros(3)
    array = LazyArray(lambda: held, held.dtype, held.shape)
    with pytest.raises(ValueError, match="read-only"):
        array.values[0] = 1
    held[0] = 1
    assert array.values.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    "values", [np.zeros((4, 3), np.float32), np.zeros((3, 4)), np.zeros((3, 4), ">f4")]
)
def test_another_shape_or_dtype_is_refused_in_process_too(values: np.ndarray) -> None:
    with pytest.raises(RefusedReply, match=r"where float32\(3, 4\) is due"):
        decode(encode(values), (3, 4), np.dtype(np.float32))


def test_it_crosses_processes_without_a_copy_and_knows_it() -> None:
    buffers: list[pickle.PickleBuffer] = []
    array = encode(np.arange(1000.0))
    message = pickle.dumps(array, protocol=5, buffer_callback=buffers.append)
    assert len(message) < 1000
    arrived = pickle.loads(message, buffers=buffers)
    np.testing.assert_array_equal(arrived.values, array.values)  # type: ignore[attr-defined]
    assert moved_bytes([array]) == 0
    assert moved_bytes([arrived]) == carried_bytes([arrived]) == 8000


def test_it_goes_over_flowers_wire_as_an_array() -> None:
    record = record_of({"w": np.arange(6, dtype=np.float32)})
    arrived = ArrayRecord.inflate(
        record.deflate(),
        {
            key: Array.inflate(child.deflate(), child.children)
            for key, child in record.children.items()
        },
    )
    assert type(arrived["w"]) is Array
    np.testing.assert_array_equal(arrived["w"].numpy(), np.arange(6))
    assert carried_bytes(arrived.values()) == moved_bytes(arrived.values()) == 24
