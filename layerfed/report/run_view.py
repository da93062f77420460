"""What the page of a run shows, as plain data that is read from the files of the run folder only."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from layerfed.config import load_config
from layerfed.config.reading import packaged
from layerfed.report.figures import TERMS, TRAFFIC, spent_by_round
from layerfed.report.plots import selection_shares
from layerfed.runs.files import read_json, read_lines
from layerfed.selection import (
    SelectionError,
    SelectionProblem,
    limit_weights,
    round_costs,
    solve,
)

__all__ = ["metric_of", "run_view"]

# Settings that say where a run is kept, and not what it does.
PLACES = ("run.name", "run.dir", "run.resume")
# Numbers of a client that are added over its rounds.
ADDED = ("bytes_up", "bytes_down", "flops", "flops_probe", "train_seconds", "steps")

Rows = Sequence[Mapping[str, Any]]


def run_view(folder: Path) -> dict[str, Any]:
    """Read a run folder, of a finished run or of one that goes on.

    Parts for which the folder has no file, as in folders of earlier versions, are None or empty.

    Raises
    ------
    OSError, ValueError
        If the folder is no run folder, or one of its files is damaged.
    """
    summary, config = read_json(folder / "summary.json"), read_json(folder / "config.json")
    metrics, selections, clients = (
        read_lines(file) if (file := folder / f"{name}.jsonl").exists() else []
        for name in ("metrics", "selection", "clients")
    )
    layers, data, evaluation = (
        read_json(file) if (file := folder / f"{name}.json").exists() else {}
        for name in ("layers", "data", "evaluation")
    )
    metric = metric_of(summary)
    scores = _scores(summary, metrics, metric["name"])
    stated: dict[int, dict[int, Mapping[str, Any]]] = {}
    for line in clients:
        stated.setdefault(line["round"], {})[line["client"]] = line
    rounds = [
        _round(row, config, stated.get(row["round"], {})) for row in selections if "layers" in row
    ]
    return {
        "kind": "run",
        "title": config.get("run.name") or folder.name,
        "summary": summary,
        "metric": metric,
        "sentence": _sentence(summary, config, metric, scores[metric["name"]]),
        "rounds": [0, *(row["round"] for row in metrics)],
        "spent": spent_by_round(metrics),
        "scores": scores,
        "losses": {
            label: [None, *(row.get(key) for row in metrics)]
            for key, label in (
                ("loss", "test loss"),
                ("client_loss", "loss on the clients' own tests"),
                ("train_loss", "loss in training"),
            )
        },
        "groups": [row.get("groups") for row in metrics],
        "layers": layers.get("layers", []),
        "selection": rounds,
        "shares": selection_shares([dict(row) for row in selections]).tolist() if rounds else [],
        "clients": _clients(clients, selections, data, evaluation, metric["name"]),
        "data": data,
        "evaluation": evaluation,
        "terms": {key: [row.get(key) for row in metrics] for key in TERMS},
        # Below this a term is rounding noise beside the gradients that it is made of.
        "terms_floor": 1e-9 * max((row.get("e1") or 0.0 for row in metrics), default=0.0),
        "traffic": {key: [row.get(key, 0) for row in metrics] for key in TRAFFIC},
        "phases": [row.get("seconds_by_phase", {}) for row in metrics],
        "seconds": [row["seconds"] for row in metrics],
        "flops": {key: sum(row.get(key) or 0 for row in metrics) for key in ADDED[2:4]},
        "updates": sum(row["clients"] for row in metrics),
        "failures": _failures(metrics),
        "privacy": _privacy(summary, metrics),
        "settings": _settings(config),
        "commands": _commands(config, folder),
    }


def metric_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run's main metric; earlier versions had accuracies only."""
    found: dict[str, Any] | None = summary.get("metric")
    return found or {"name": "accuracy", "higher_is_better": True, "low": 0.0, "high": 1.0}


def _scores(summary: Mapping[str, Any], metrics: Rows, main: str) -> dict[str, list[float | None]]:
    """Return each score by round, the main metric first; round 0 is the model before training."""
    names = [main, *(n for row in metrics for n in row.get("scores") or {} if n != main)]
    found = {
        name: [
            (summary.get("initial_scores") or {}).get(name),
            *((row.get("scores") or {}).get(name) for row in metrics),
        ]
        for name in names
    }
    if "accuracy" in found:
        found["accuracy"] = [
            summary.get("initial_accuracy"),
            *(row.get("accuracy") for row in metrics),
        ]
    if any(row.get(f"client_{main}") is not None for row in metrics):
        found[f"{main} on the clients' own tests"] = [
            None,
            *(row.get(f"client_{main}") for row in metrics),
        ]
    return found


def _sentence(
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
    metric: Mapping[str, Any],
    scores: Sequence[float | None],
) -> str:
    """Say in one sentence what happened."""
    known = [score for score in scores if score is not None]
    done, status = summary["rounds"], summary["status"]
    asked, clients = config.get("federation.clients-per-round"), config.get("federation.clients")
    what = (
        f"{config.get('strategy.name')} fine-tuned {_model(config)} on "
        f"{config.get('task.name')} in {done} of {config.get('federation.rounds')} rounds with "
        f"{asked or clients} of {clients} clients each"
    )
    percent = metric["low"] == 0 and metric["high"] == 1
    form = ".2%" if percent else ".4g"
    if len(known) > 1:
        what += f"; test {metric['name']} went from {known[0]:{form}} to {known[-1]:{form}}"
    if full := summary.get("bytes_full_up"):
        what += f", for {summary['bytes_up'] / full:.1%} of the uplink of full-model exchange"
    if summary.get("epsilon") is not None:
        what += (
            f", at a privacy loss of ε = {float(summary['epsilon']):.3g} (δ = {summary['delta']:g})"
        )
    ended = {
        "running": " The run is not finished.",
        "completed": "",
        "failed": f" The run failed: {summary.get('error')}",
    }
    return f"{what}.{ended.get(status, f' The run was {status}.')}"


def _model(config: Mapping[str, Any]) -> str:
    """Name the model; a task of one's own may build another one than model.name."""
    return "its model" if ":" in str(config.get("task.name")) else str(config.get("model.name"))


def _round(
    row: Mapping[str, Any], config: Mapping[str, Any], stated: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return one round's clients × layers, with what each client stated."""
    masks = np.asarray(row["masks"], dtype=bool).reshape(len(row["clients"]), len(row["layers"]))
    costs = np.broadcast_to(np.asarray(row["costs"], dtype=float), masks.shape)
    depth = np.broadcast_to(np.asarray(row.get("depth_costs", 0.0), dtype=float), masks.shape)
    statistics = {**row.get("assumed", {}), **row.get("statistics", {})}
    found = {
        "norms": statistics.get("grad_norm_sq"),
        # What the strategy's objective adds up.
        "gains": statistics.get(config.get("strategy.statistic", "grad_norm_sq")),
    }
    known = {
        name: np.asarray(values, dtype=float)
        for name, values in found.items()
        if values is not None and np.shape(values) == masks.shape
    }
    problem = SelectionProblem(
        known.get("gains", np.zeros(masks.shape)),
        costs,
        np.asarray(row["budgets"], dtype=float),
        0.0,
        depth,
    )
    # Noise of private norms may be below 0.
    norms = np.sqrt(np.maximum(known["norms"], 0.0)) if "norms" in known else None
    return {
        "round": row["round"],
        "clients": row["clients"],
        "layers": row["layers"],
        "masks": ["".join(map(str, line)) for line in masks.astype(int).tolist()],
        "budgets": row["budgets"],
        "spent": problem.spent(masks).tolist(),
        "norms": None if norms is None else [[float(f"{g:.5g}") for g in line] for line in norms],
        "gains": np.where(masks, problem.values, 0.0).sum(axis=1).tolist()
        if "gains" in known
        else None,
        "held": row.get("held", []),
        "solver": row["solver"],
        "seconds": row["seconds"],
        "gap": row["gap"],
        "consistency": row.get("consistency"),
        "bound": row["bound"],
        "rounding": row.get("rounding", 0.0),
        "objective": row["objective"],
        **(_worth(row, problem, masks, config) if "gains" in known else {}),
        **{
            key: [stated.get(c, {}).get(key) for c in row["clients"]]
            for key in ("train_loss", "bytes_up", "train_seconds", "failed")
        },
    }


def _worth(
    row: Mapping[str, Any], problem: SelectionProblem, masks: np.ndarray, config: Mapping[str, Any]
) -> dict[str, float]:
    """Return the gain of a round's masks, the penalty that λ took, and the gain without λ.

    The gain is Σ_i Σ_l m_i(l) ‖g_{i,l}‖² or that of another statistic, and the penalty is
    λ Σ_{i<j} ‖m_i − m_j‖₁ [S, (P1)]. The best gain is that of each client's own best layers within its
    budget, which is (P1)'s at λ = 0. A charge for switching layers is in the objective too; then nothing
    is returned.
    """
    if row["objective"] is None or row.get("held") or config.get("strategy.switching"):
        return {}
    share = config.get("strategy.solver-rounding", 0.0)
    with suppress(ValueError, SelectionError):
        weighed, _ = limit_weights(round_costs(problem, share)[0])
        gain = float(weighed.values[masks].sum())
        best = solve(replace(weighed, consistency=0.0), time_limit=1.0).objective
        return {
            "gain": gain,
            "penalty": gain - row["objective"],
            "best_gain": max(best, gain),
        }
    return {}


def _clients(
    lines: Rows,
    selections: Rows,
    data: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    main: str,
) -> list[dict[str, Any]]:
    """Return a line for each client: what it has, what it did, and how the model does on it."""
    found: dict[int, dict[str, Any]] = {}

    def of(client: int) -> dict[str, Any]:
        blank = {"rounds": 0, "failures": 0, "reason": None, "layers": 0, "score": None}
        return found.setdefault(client, {"client": client, **blank, **dict.fromkeys(ADDED, 0)})

    for row in data.get("clients", []):
        of(row["partition"]).update(
            examples=row["examples"], classes=row.get("classes"), groups=row.get("groups")
        )
    for line in lines:
        row = of(line["client"])
        row["rounds"] += 1
        for key in ADDED:
            row[key] += line.get(key) or 0
        if line.get("failed"):
            row["failures"] += 1
            row["reason"] = f"{line['failed']}: {line['reason']}"
        if line.get(f"client_{main}") is not None:
            row["score"] = line[f"client_{main}"]
    for selection in selections:
        for client, mask in zip(selection.get("clients", []), selection["masks"], strict=False):
            of(client)["layers"] += sum(mask)
    for row in evaluation.get("clients", []):
        scores = {k: v for k, v in row.items() if k not in ("partition", "examples", "round")}
        of(row["partition"]).update(
            score=scores.get(main), scores=scores, evaluated=row.get("round")
        )
    return [found[client] for client in sorted(found)]


def _failures(metrics: Rows) -> list[dict[str, Any]]:
    """Return failures with the same phase and reason as one line."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in metrics:
        for failure in row.get("failure_reasons", []):
            key = (failure["phase"], failure["reason"])
            line = found.setdefault(
                key, {"phase": key[0], "reason": key[1], "count": 0, "clients": [], "rounds": []}
            )
            line["count"] += 1
            for name, value in (("clients", failure["client"]), ("rounds", row["round"])):
                if value not in line[name]:
                    line[name].append(value)
    return sorted(found.values(), key=lambda line: -line["count"])


def _privacy(summary: Mapping[str, Any], metrics: Rows) -> dict[str, Any] | None:
    if summary.get("delta") is None:
        return None
    return {
        "epsilon": [row.get("epsilon") for row in metrics],
        "delta": summary["delta"],
        "covers": summary.get("epsilon_covers"),
    }


def _settings(config: Mapping[str, Any]) -> list[list[Any]]:
    """Return (key, value, default, whether they differ) of each setting."""
    defaults = load_config(packaged("default")).to_flat()  # a file here may be called so too
    return [
        [key, value, defaults.get(key), key not in PLACES and value != defaults.get(key)]
        for key, value in config.items()
    ]


def _commands(config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Return the commands that repeat the run: from its folder, and without it."""
    name = re.sub(r"[^\w.-]+", "-", f"{config.get('run.name') or folder.name}-again")
    differ = [
        f"{key}={'true' if value is True else 'false' if value is False else value}"
        for key, value, _, differs in _settings(config)
        if differs
    ]
    return {
        "from its folder": shlex.join(
            ["layerfed", "run", str(folder / "config.json"), f"run.name={name}"]
        ),
        "from its settings": shlex.join(["layerfed", "run", *differ]),
    }
