"""Every forged array is refused, and has no other effect."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import given, settings
from hypothesis import strategies as st

from layerfed.exchange import RefusedReply, read_train_reply
from layerfed.exchange.arrays import decode
from tests.exchange.replies import (
    DTYPE,
    EXPECTED,
    SHAPE,
    VALID,
    header,
    npy,
    raw,
    refused,
    reply_with,
    update,
    with_header,
)

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
    """Otherwise the forgeries above could be refused for another reason."""
    for data in (VALID, with_header(header(), VALID[-48:])):
        found = read_train_reply(reply_with(raw(data)), EXPECTED)
        np.testing.assert_array_equal(found.update["w"], update()["w"])


def test_another_serialisation_is_refused() -> None:
    assert "'w' is an array" in refused(reply_with(raw(VALID, stype="pickle")))


def test_what_an_array_says_of_itself_beside_its_bytes_is_not_believed() -> None:
    liar = Array("float32", (3, 4), "numpy.ndarray", npy(np.zeros((3, 5), np.float32)))
    assert "float32(3, 5) where float32(3, 4) is due" in refused(reply_with(liar))


def test_reading_allocates_no_more_than_the_reply_brought() -> None:
    """The update is a read-only view of the received bytes."""
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
