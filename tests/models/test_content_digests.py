"""Digests depend on a layer's content and on nothing else."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerfed.digests import content_digest, digest, fingerprint


@given(st.integers(0, 2**16), st.sampled_from(["float32", "float16", "int64", "bool"]))
def test_a_digest_follows_content_alone(seed: int, dtype: str) -> None:
    values = (np.random.default_rng(seed).standard_normal((3, 4)) * 100).astype(dtype)
    base = digest({"w": values})
    assert digest({"w": torch.from_numpy(values.copy())}) == base
    assert digest({"w": np.asfortranarray(values)}) == base
    assert digest({"w": values.astype(values.dtype.newbyteorder(">"))}) == base
    assert digest({"w": values, "v": values}) == digest({"v": values, "w": values})
    assert digest({"v": values}) != base
    assert digest({"w": values.reshape(4, 3)}) != base
    changed = values.copy()
    changed.view(np.uint8).reshape(-1)[seed % values.nbytes] ^= 1
    assert digest({"w": changed}) != base


def test_digests_tell_types_and_tensors_apart() -> None:
    zeros = torch.zeros(4, dtype=torch.bfloat16)
    kinds = [zeros, zeros.half(), zeros.view(torch.int16), torch.tensor(0.0)]
    assert len({digest({"w": kind}) for kind in kinds}) == 4
    assert digest({"w": zeros, "b": zeros}) != digest({"w": zeros})
    assert fingerprint({"a": "1", "b": "2"}) == fingerprint({"b": "2", "a": "1"})
    assert fingerprint({"a": "1", "b": "2"}) != fingerprint({"a": "2", "b": "1"})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.complex64])
def test_a_digest_needs_no_type_of_numpy(dtype: torch.dtype) -> None:
    ones = torch.ones(2, 3).to(dtype)
    assert digest({"w": ones}) == digest({"w": ones.clone().requires_grad_(True)})
    assert digest({"w": ones.t()}) == digest({"w": ones.t().contiguous()})
    assert digest({"w": ones}) != digest({"w": torch.zeros(2, 3).to(dtype)})


def test_a_digest_copies_nothing_that_is_contiguous() -> None:
    values = np.zeros(2**20)
    tracemalloc.start()
    digest({"w": values, "v": torch.from_numpy(values)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < values.nbytes / 10


def test_names_on_a_disk_are_those_of_earlier_versions() -> None:
    """Earlier versions' stores, caches and checkpoints have these names."""
    layer = {"w": np.arange(3, dtype=np.float32), "n": np.asarray(7)}
    assert digest(layer) == "64967057a8c3cb86c2b954278c08b853"
    assert fingerprint({"head": "b", "blocks.0": "a"}) == "5663604e02395952dea51044549e4900"
    assert content_digest("run/1/residual") == "489d866a19407cf166dfb49789ad4fd6"
    assert (
        content_digest("run", b"/1", memoryview(b"/residual")) == "489d866a19407cf166dfb49789ad4fd6"
    )
