"""A run folder of any size, with every file that a page reads, made without a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layerfed.config import load_config
from layerfed.report.figures import TRAFFIC

# What an attacker would send: a client's reason, a class's name, a group's name.
EVIL = "</script><img src=x onerror=document.title='owned'>'\"&<b>"
CLASSES = ("cat", EVIL, "zebra")
GROUPS = ("north", EVIL)


def make_folder(
    folder: Path,
    rounds: int = 5,
    clients: int = 6,
    layers: int = 4,
    *,
    seed: int = 0,
    settings: Sequence[str] = (),
    better: float = 0.0,
) -> Path:
    """Write a completed run in which client 1 fails in round 2."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    names = [f"blocks.{number}" for number in range(layers)]
    config = load_config(
        Path("default"),
        [
            f"federation.clients={clients}",
            f"federation.rounds={rounds}",
            f"run.seed={seed}",
            f"run.name={folder.name}",
            "privacy.mode=central",
            "privacy.noise=1.0",
            "strategy.period=1",
            *settings,
        ],
    ).to_flat()
    layer_rows = [
        {
            "name": "embeddings",
            "kind": "embeddings",
            "elements": 10,
            "bytes": 40,
            "forward_flops": 5.0,
        },
        *(
            {"name": name, "kind": "block", "elements": 250, "bytes": 1000, "forward_flops": 40.0}
            for name in names
        ),
        {"name": "head", "kind": "head", "elements": 25, "bytes": 100, "forward_flops": 5.0},
    ]
    metrics: list[dict[str, Any]] = []
    selections: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    whole = 1140
    for number in range(1, rounds + 1):
        failed = [1] if number == 2 else []
        masks = (rng.random((clients, layers)) < 0.4).astype(int)
        masks[:, 0] = 1
        gains = rng.lognormal(size=(clients, layers))
        accuracy = round(min(1.0, 0.3 + 0.6 * number / rounds + better), 4)
        share = dict.fromkeys(("train_seconds", "steps"), 2.0 * clients)
        up = 1100 * (clients - len(failed))
        metrics.append(
            {
                "round": number,
                "accuracy": accuracy,
                "loss": 2.0 / number,
                "e1": 3.0 + rng.random(),
                "e2": 1e-16 * rng.random(),  # rounding noise
                "e2_masks": 0.0,
                "update_norm": 0.5,
                "epsilon": 0.3 * number,
                "epsilon_covers": "updates",
                "lr": 0.05,
                "clients": clients - len(failed),
                "late": 0,
                "clipped": 0,
                "failures": len(failed),
                "failure_reasons": [
                    {"client": client, "phase": "train", "reason": EVIL} for client in failed
                ],
                "seconds": 3.0,
                "seconds_by_phase": {"probe": 0.5, "select": 0.25, "train": 2.0, "evaluate": 0.25},
                "bytes_up": up,
                "bytes_down": up,
                "bytes_moved_up": up,
                "bytes_moved_down": 0,
                "bytes_full_up": whole * clients,
                "bytes_full_down": whole * clients,
                "train_loss": 1.8 / number,
                "client_accuracy": None,
                "client_loss": None,
                "flops": 4e9 * clients,
                "flops_probe": 1e9 * clients,
                **share,
                "peak_memory": 1e6,
                "peak_memory_probe": 1e6,
                "scores": {"accuracy": accuracy, "f1": 0.5},
                "groups": {group: {"examples": 10, "accuracy": 0.5} for group in GROUPS},
            }
        )
        objective = float(gains[masks.astype(bool)].sum()) - 0.25
        selections.append(
            {
                "round": number,
                "clients": list(range(clients)),
                "budgets": [float(layers)] * clients,
                "costs": [1.0] * layers,
                "layers": names,
                "masks": masks.tolist(),
                "statistics": {"grad_norm_sq": gains.tolist()},
                "objective": objective,
                "bound": objective,
                "gap": 0.0,
                "rounding": 0.0,
                "solver": "lagrangian",
                "seconds": 0.002,
            }
        )
        for client in range(clients):
            lost = client in failed
            lines.append(
                {
                    "round": number,
                    "client": client,
                    "bytes_up": 0 if lost else 1100,
                    "bytes_down": 1100,
                    "bytes_full_up": whole,
                    "bytes_full_down": whole,
                    "updated": ["blocks.0", "head"],
                    "train_loss": None if lost else 1.5,
                    "client_accuracy": None,
                    "flops": 4e9,
                    "flops_probe": 1e9,
                    "steps": 2.0,
                    "train_seconds": 2.0,
                    "failed": "train" if lost else None,
                    "reason": EVIL if lost else None,
                }
            )
    final = metrics[-1]["accuracy"]
    summary = {
        "task": "digits",
        "strategy": config["strategy.name"],
        "seed": seed,
        "engine": "inprocess",
        "rounds": rounds,
        "initial_accuracy": 0.1,
        "accuracy": final,
        "best_accuracy": final,
        "metric": {"name": "accuracy", "higher_is_better": True, "low": 0.0, "high": 1.0},
        "best": {"round": rounds, "value": final},
        "seconds": 3.0 * rounds,
        **{key: sum(row[key] for row in metrics) for key in (*TRAFFIC, "flops", "flops_probe")},
        "failures": 1,
        "epsilon": metrics[-1]["epsilon"],
        "epsilon_covers": "updates",
        "delta": 1e-5,
        "repeated_rounds": [],
        "status": "completed",
        "versions": {"python": "3.11", "torch": "2.14", "layerfed": "0.1.0"},
    }
    confusion = [[8, 1, 1], [2, 7, 1], [0, 0, 10]]
    evaluation = {
        "round": rounds,
        "scores": {"accuracy": final},
        "classes": list(CLASSES),
        "per_class": [
            {"class": name, "precision": 0.8, "recall": 0.7, "f1": 0.75, "support": 10}
            for name in CLASSES
        ],
        "confusion": confusion,
        "calibration": {
            "ece": 0.0321,
            "bins": [
                {"confidence": 0.05 + 0.1 * i, "accuracy": 0.02 + 0.1 * i, "examples": 3}
                for i in range(10)
            ],
        },
        "groups": {
            group: {"examples": 15, "accuracy": 0.6 + 0.2 * i} for i, group in enumerate(GROUPS)
        },
        "clients": [{"partition": c, "examples": 9, "accuracy": 0.5} for c in range(clients)],
    }
    data = {
        "classes": list(CLASSES),
        "groups": list(GROUPS),
        "test": {"examples": 30, "classes": [10, 10, 10], "groups": dict.fromkeys(GROUPS, 15)},
        "clients": [
            {"partition": c, "examples": 9, "classes": [3, c % 4, 2], "groups": {GROUPS[c % 2]: 9}}
            for c in range(clients)
        ],
    }
    for name, content in {
        "config": config,
        "summary": summary,
        "layers": {"forward_flops": 10 + 40.0 * layers, "layers": layer_rows},
        "evaluation": evaluation,
        "data": data,
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    for name, rows in {"metrics": metrics, "selection": selections, "clients": lines}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def failed_at_once(folder: Path) -> Path:
    """Write a run that failed in its first round."""
    make_folder(folder)
    for name in ("evaluation.json", "clients.jsonl", "metrics.jsonl", "selection.jsonl"):
        (folder / name).unlink()
    file = folder / "summary.json"
    totals = dict.fromkeys((*TRAFFIC, "flops", "flops_probe", "failures", "rounds", "seconds"), 0)
    blank = {"scores": {}, "initial_scores": {}, "best": None, "accuracy": None}
    ended = {"status": "failed", "error": "RoundFailed: nobody answered", "epsilon": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | totals | blank | ended))
    return folder
