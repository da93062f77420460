"""Secure sums through Flower's Ray simulation: keys and shares lie in Flower's own state."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from layerfed.config import load_config
from layerfed.engine import run_on

SETTINGS = [
    *("strategy.name=top", "secagg.enabled=true", "secagg.threshold=1"),
    *("federation.clients=3", "federation.clients-per-round=3", "federation.rounds=2"),
    *("train.local-steps=1", "train.batch-size=8"),
]


def test_over_ray_the_model_is_the_inprocess_engines(tmp_path: Path) -> None:
    layerfed = Path(sys.executable).parent / "layerfed"
    command = [layerfed, "run", *SETTINGS, "run.name=ray", "--engine", "ray", "--dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    run_on("inprocess", load_config(None, [*SETTINGS, f"run.dir={tmp_path}", "run.name=here"]))
    folders = [tmp_path / "ray", tmp_path / "here"]
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in folders)
    assert (one["engine"], one["status"]) == ("ray", "completed")
    assert one["bytes_up"] == other["bytes_up"]
    ray, here = (load_file(folder / "model.safetensors") for folder in folders)
    for name in here:
        np.testing.assert_allclose(ray[name], here[name], rtol=0, atol=1e-6, err_msg=name)
