"""Whole runs give the same results as before; see `tests/golden/runs.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.golden.runs import FILE, RUNS, TOLERANCE, run

KNOWN: dict[str, Any] = json.loads(FILE.read_text())


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_what_it_gave(name: str, tmp_path: Path) -> None:
    found, known = run(name, tmp_path), KNOWN[name]
    for exact in ("masks", "updated", "ledger"):
        assert found[exact] == known[exact], exact
    for close in ("train_loss", "loss", "e1", "e2"):
        pair = [np.array(x[close], dtype=np.float64) for x in (found, known)]  # None as NaN
        np.testing.assert_allclose(*pair, rtol=TOLERANCE, err_msg=close)
    assert found["sketch"].keys() == known["sketch"].keys()
    for tensor, values in known["sketch"].items():
        size = abs(values[0]) + 1e-12
        assert found["sketch"][tensor] == pytest.approx(values, abs=TOLERANCE * size), tensor
