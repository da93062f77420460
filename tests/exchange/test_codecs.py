"""A codec's error is within its stated bound, and is sent later if the codec has error feedback."""

from __future__ import annotations

import typing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from layerfed.config import ExchangeConfig
from layerfed.exchange import CODECS, MemoryStore, RefusedReply, compress, read_train_reply
from layerfed.exchange import train_reply as reply
from tests.exchange.replies import EXPECTED, ask, over_the_wire, update

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, max_side=6)
UPDATES = hnp.arrays(
    np.float32, SHAPES, elements=st.floats(-6e4, 6e4, width=32, allow_subnormal=False)
)


def sent_and_read(name: str, values: np.ndarray) -> np.ndarray:
    codec = CODECS[name]
    parts = codec.encode({"w": values})
    assert {k: (p.shape, p.dtype) for k, p in parts.items()} == codec.parts_of("w", values)
    return codec.decode("w", values, parts)


def bound(name: str, values: np.ndarray) -> np.ndarray:
    """The largest error of each element, as the module's table states it."""
    size = np.abs(values.astype(np.float64))
    if name == "float32":
        return np.zeros_like(size)
    if name == "float16":
        return np.maximum(size * 2.0**-11, 2.0**-25)
    if name == "bfloat16":
        return size * 2.0**-8
    table = size.reshape(size.shape[0] if size.ndim > 1 else 1, -1)
    # A hair more, for the rounding of the scale itself.
    row = table.max(axis=1, keepdims=True, initial=0) / 254 * (1 + 1e-4)
    return np.broadcast_to(row, table.shape).reshape(size.shape)


@pytest.mark.parametrize("name", CODECS)
@settings(deadline=None, max_examples=150)
@given(values=UPDATES)
def test_the_error_is_within_the_stated_bound(name: str, values: np.ndarray) -> None:
    found = sent_and_read(name, values)
    assert found.dtype == np.float32
    assert found.shape == values.shape
    assert (np.abs(found.astype(np.float64) - values) <= bound(name, values)).all()


@pytest.mark.parametrize(
    ("name", "bytes_"), [("float32", 400), ("float16", 200), ("bfloat16", 200), ("int8", 100 + 40)]
)
def test_bytes_are_those_of_the_table(name: str, bytes_: int) -> None:
    parts = CODECS[name].encode({"w": np.ones((10, 10), np.float32)})
    assert sum(part.nbytes for part in parts.values()) == bytes_


def test_every_codec_can_be_configured() -> None:
    annotation = ExchangeConfig.model_fields["codec"].annotation
    assert set(typing.get_args(annotation)) == set(CODECS)


@pytest.mark.parametrize("name", CODECS)
def test_tensors_of_other_types_travel_as_they_are(name: str) -> None:
    counter = np.asarray(12345, dtype=np.int64)
    parts = CODECS[name].encode({"count": counter})
    assert parts["count"].dtype == np.int64
    assert CODECS[name].decode("count", counter, parts) == 12345


@pytest.mark.parametrize("name", CODECS)
def test_a_reply_is_read_with_the_codec_it_was_written_in(name: str) -> None:
    message = over_the_wire(reply(ask(), CODECS[name].encode(update()), 9, loss=0.5))
    found = read_train_reply(message, EXPECTED, CODECS[name]).update
    assert (np.abs(found["w"] - update()["w"]) <= bound(name, update()["w"])).all()
    for other in set(CODECS) - {name}:
        with pytest.raises(RefusedReply):
            read_train_reply(message, EXPECTED, CODECS[other])


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_through_every_codec(name: str, value: float) -> None:
    values = update()["w"]
    values[1, 2] = value
    message = reply(ask(), CODECS[name].encode(update(w=values)), 9, loss=0.5)
    with pytest.raises(RefusedReply, match="'w' holds NaN or Inf"):
        read_train_reply(message, EXPECTED, CODECS[name])


def test_a_forged_scale_cannot_make_infinity() -> None:
    parts = CODECS["int8"].encode(update())
    parts["w#scale"][:] = 3e38
    with pytest.raises(RefusedReply, match="'w' holds NaN or Inf"):
        read_train_reply(reply(ask(), parts, 9, loss=0.5), EXPECTED, CODECS["int8"])


def test_an_update_too_large_for_float16_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"'w' reaches 70000.*to bfloat16"):
        CODECS["float16"].encode({"w": np.full(3, 7e4, np.float32)})


def test_bfloat16_rounds_ties_to_even_like_torch() -> None:
    import torch

    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    theirs = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(sent_and_read("bfloat16", values), theirs)


# ------------------------------------------------------------------------------ error feedback
def test_with_error_feedback_nothing_is_lost_only_delayed() -> None:
    """Over any number of rounds, the sum of sent updates is the true sum up to one round's rounding."""
    rng = np.random.default_rng(3)
    store, total_sent, total_meant = MemoryStore(), np.zeros((4, 50)), np.zeros((4, 50))
    for _ in range(200):
        # One large element decides the scale of a row in which all others are far below a level.
        meant = rng.normal(1e-4, 1e-5, (4, 50)).astype(np.float32)
        meant[:, 0] = 1.0
        parts = compress(CODECS["int8"], {"head": {"w": meant}}, store, "run/3")
        total_sent += CODECS["int8"].decode("w", meant, parts)
        total_meant += meant
    assert np.abs(total_sent - total_meant).max() <= 1.1 / 254 + 1e-4
    without = sum(sent_and_read("int8", np.asarray([[1.0, 1e-4]], np.float32)) for _ in range(200))
    assert without[0, 1] == 0, "without it the small element never gets through"


def test_errors_are_kept_by_run_client_and_layer() -> None:
    store = MemoryStore()
    delta = {"w": np.asarray([1.0, 0.001], np.float32)}
    first = compress(CODECS["int8"], {"head": delta}, store, "run/0")
    for other in ({"blocks.0": delta}, "run/0"), ({"head": delta}, "run/1"):
        again = compress(CODECS["int8"], other[0], store, other[1])
        assert np.array_equal(first["w"], again["w"])
    assert store.recall("run/0/head") is not None
    compress(CODECS["int8"], {"head": delta}, store, "next/0")
    assert store.recall("run/0/head") is None, "another run does not see it"


def test_codecs_without_feedback_remember_nothing() -> None:
    store = MemoryStore()
    compress(CODECS["bfloat16"], {"head": {"w": np.ones(3, np.float32)}}, store, "run/0")
    assert store.recall("run/0/head") is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e20])
def test_a_step_that_overflows_is_an_error_and_is_not_remembered(bad: float) -> None:
    store = MemoryStore()
    good = {"w": np.asarray([1.0, 0.001], np.float32)}
    compress(CODECS["int8"], {"head": good}, store, "run/0")
    before = store.recall("run/0/head")
    spoilt = {"blocks.0": good, "head": {"w": np.asarray([bad, 0.001], np.float32)}}
    with pytest.raises(ValueError, match=r"'w' holds.*lower train\.lr"):
        compress(CODECS["int8"], spoilt, store, "run/0")
    assert store.recall("run/0/head") is before
    assert store.recall("run/0/blocks.0") is None
    again = compress(CODECS["int8"], {"head": good}, store, "run/0")
    assert all(np.isfinite(part).all() for part in again.values())


# ------------------------------------------------------------------------------------- buffers
# A channel that went quiet beside a loud one: the change of its variance is far below a level of the
# row, and rounded to -0.7 in a row of int8.
VARIANCE = np.asarray([90.0, 0.5, 1.006], np.float32)
QUIET = np.asarray([1.0, 0.001, 0.001], np.float32) - VARIANCE


@pytest.mark.parametrize("name", CODECS)
def test_buffers_are_not_coded(name: str) -> None:
    codec, store = CODECS[name].sparing(["norm.running_var"]), MemoryStore()
    update = {"norm.running_var": QUIET, "norm.weight": QUIET}
    parts = compress(codec, {"blocks.0": update}, store, "run/0")
    assert parts["norm.running_var"] is QUIET
    found = codec.decode("norm.running_var", QUIET, parts)
    assert (VARIANCE + found > 0).all()
    assert codec.parts_of("norm.running_var", QUIET) == {
        "norm.running_var": ((3,), np.dtype(np.float32))
    }
    assert "norm.running_var" not in (store.recall("run/0/blocks.0") or {})
    assert not CODECS[name].exact, "the codecs in the table are shared by all models"


@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_a_coded_variance_would_be_negative(name: str) -> None:
    assert (VARIANCE + sent_and_read(name, QUIET)).min() < 0
