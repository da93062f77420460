"""The folder a run leaves: everything it printed can be recomputed from there.

Append-only files are flushed each round; everything else is written beside its place and renamed, so
whatever a killed run leaves is whole.
"""

from __future__ import annotations

import math
import platform
import re
import threading
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from logging import WARNING
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from filelock import FileLock
from flwr.common.logger import log

from layerfed.config import ConfigError, RunConfig, expanded
from layerfed.config.same import differing
from layerfed.exchange.metrics import METRICS
from layerfed.exchange.scores import ACCURACY, LOSS, score_of
from layerfed.models.layers import LayerMap
from layerfed.runs.files import (
    NotWritten,
    append_line,
    lock,
    read_json,
    read_lines,
    write_json,
    write_lines,
    write_tensors,
)
from layerfed.runs.ledger import Ledger
from layerfed.runs.records import Observer, RoundRecord, SelectionRecord

__all__ = ["RunFolder", "metrics_line"]

PACKAGES = ("layerfed", "flwr", "torch", "timm", "numpy", "pulp")
# Files with lines of each round.
LINES = ("metrics.jsonl", "ledger.jsonl", "clients.jsonl", "selection.jsonl")
# Names in the folder's files of what the ledger counts.
TRAFFIC = {
    "bytes_up": "up",
    "bytes_down": "down",
    "bytes_moved_up": "moved_up",
    "bytes_moved_down": "moved_down",
    "bytes_full_up": "full_up",
    "bytes_full_down": "full_down",
}


class RunFolder(Observer):
    """Writes a run folder while the run goes on; a context manager that records how it ended.

    Parameters
    ----------
    path : Path
        The folder, which exists and is empty.
    config : RunConfig
    engine : str
        What the clients run on.
    data : str
        Fingerprint of the server's data.
    """

    def __init__(self, path: Path, config: RunConfig, engine: str, data: str = "") -> None:
        self.path = path
        self.config = config
        self.engine = engine
        self.data = data
        self._lock: FileLock | None = None
        # Who stops a run may be another thread than the one that writes, or a signal handler in it.
        self._writing = threading.RLock()
        self._ended = False
        self._began = time.monotonic()
        self._before = 0.0
        self._initial: float | None = None
        self._before_training: dict[str, float | None] = {}
        self._totals: dict[str, float] = dict.fromkeys(
            (*TRAFFIC, *(m.name for m in METRICS.values() if m.total)), 0
        )
        self._failures = 0
        self._epsilon: dict[str, Any] = {"epsilon": None, "epsilon_covers": None}
        self.repeated_rounds: list[int] = []
        """Rounds that were cut off and done again, or are to be, once for each time."""
        self._metric = ACCURACY
        self._scores: dict[int, dict[str, float | None]] = {}

    def _open(self) -> Self:
        """Write what is known before the first round."""
        # Ready to be run again from any folder, which is not to go on with it.
        settings = self.config.absolute().to_flat()
        write_json(self.path / "config.json", settings | {"run.resume": ""})
        self._summarise("running")
        return self

    @classmethod
    def create(cls, config: RunConfig, engine: str, data: str = "") -> RunFolder:
        """Make a new folder `run.dir`/`run.name`.

        Raises
        ------
        ConfigError
            If the folder is there already (no run is ever overwritten) or cannot be written.
        """
        root = expanded(config.run.dir or "runs").resolve()
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        made = f"{config.task.name}-{config.strategy.name}-{stamp}"
        name = config.run.name or re.sub(r"[^\w.-]+", "-", made)
        path = root / name
        for attempt in range(2, 100):
            try:
                path.mkdir(parents=True)
                folder = cls(path, config, engine, data)
                folder._lock = lock(path)
                return folder._open()
            except FileExistsError:
                if config.run.name:
                    raise ConfigError(
                        f"run.name = '{name}': {path} exists already; go on with that run "
                        f"(--resume {path}), or choose another name"
                    ) from None
                path = root / f"{name}-{attempt}"
            except (OSError, NotWritten) as error:
                reason = error.reason if isinstance(error, NotWritten) else error.strerror
                raise ConfigError(f"run.dir = '{root}' cannot be written: {reason}") from None
        raise ConfigError(f"run.dir = '{root}' is full of runs named {name}")

    @classmethod
    def reopen(
        cls,
        path: Path,
        config: RunConfig,
        engine: str,
        last_round: int,
        defaults: Mapping[str, object],
        data: str = "",
    ) -> RunFolder:
        """Go on with a run's folder after a round; what was written of later rounds is dropped.

        Parameters
        ----------
        path : Path
            The caller holds its lock, since before it looked for a checkpoint there.
        config : RunConfig
            That of the run, as `layerfed.config.same` has it.
        engine : str
        last_round : int
            The round of the checkpoint that the run continues from.
        defaults : Mapping[str, object]
            Those of the strategy's options, which an earlier version may not have written down.
        data : str
            Fingerprint of the server's data. The same data may lie elsewhere than before.

        Raises
        ------
        ConfigError
            If the folder's run had another configuration or more rounds, or a file lacks what the
            checkpoint has.
        """
        try:
            theirs, before = (read_json(path / name) for name in ("config.json", "summary.json"))
            found = {name: read_lines(path / name) for name in LINES if (path / name).exists()}
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"run.resume = '{path}': {error}; it cannot be gone on with"
            ) from None
        if data and before.get("data") == data:
            theirs["task.data"] = config.task.data
        if other := differing(config, theirs, defaults, goes_on=True):
            raise ConfigError(
                f"run.resume = '{path}' had another configuration ({', '.join(other)}); resume with "
                "its own config.json"
            )
        if config.federation.rounds < last_round:
            raise ConfigError(
                f"federation.rounds = {config.federation.rounds}, and run.resume = '{path}' has done "
                f"{last_round}; give that number or more"
            )
        # Else scores would have a hole, and the privacy that was spent would be stated too low.
        for name in ("metrics.jsonl", "ledger.jsonl"):
            there = {row["round"] for row in found.get(name, [])}
            if lost := [number for number in range(1, last_round + 1) if number not in there]:
                raise ConfigError(
                    f"run.resume = '{path}': {name} lacks round {lost[0]}, which its checkpoint has; it "
                    "cannot be gone on with"
                )
        again = [
            row["round"] for row in found.get("metrics.jsonl", []) if row["round"] > last_round
        ]
        if before["status"] != "completed":
            again.append(max([last_round, *again]) + 1)  # the one that was going on
        repeated = [*before["repeated_rounds"], *again]
        # Before the lines that say so are dropped, or a kill here would forget what was revealed.
        write_json(path / "summary.json", before | {"repeated_rounds": repeated})
        kept: dict[str, list[dict[str, Any]]] = {}
        for name in LINES:
            kept[name] = [row for row in found.get(name, []) if row["round"] <= last_round]
            write_lines(path / name, kept[name])
        # Nothing is written before all is known again: the run may be killed here too.
        folder = cls(path, config, engine, data)
        folder.repeated_rounds = repeated
        folder._initial = before["initial_accuracy"]
        folder._before_training = before.get("initial_scores") or {}
        folder._metric = score_of(before.get("metric"))
        folder._before = sum(row["seconds"] for row in kept["metrics.jsonl"])
        for row in kept["metrics.jsonl"]:
            folder._count(row)
        return folder._open()

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Record how the run ended."""
        try:
            if isinstance(error, KeyboardInterrupt):
                self.stop("interrupted")
            elif isinstance(error, SystemExit):
                self.stop()
            elif error is not None:
                self.stop("failed", error=f"{type(error).__name__}: {error}")
        finally:
            self._ended = True
            if self._lock is not None:
                self._lock.release()

    def stop(self, status: str = "stopped", **more: Any) -> None:
        """Record that the run is over; what its rounds would still report is not written any more."""
        with self._writing:
            try:
                self._summarise(status, **more)
            except NotWritten as error:
                # Most likely what the run failed of; that must not take the place of the reason.
                log(WARNING, "the run folder cannot say how the run ended: %s", error)
            self._ended = True

    def asked(self) -> list[tuple[int, list[int]]]:
        """Return the rounds so far, each with the clients (partition ids) that were asked in it."""
        file = self.path / "ledger.jsonl"
        rows = read_lines(file) if file.exists() else []
        return [(row["round"], row["clients"]) for row in rows]

    def describe(
        self, base: str, layers: LayerMap, forward: Mapping[str, float], whole: float
    ) -> None:
        """Write the layers of the model and the identity of its base, `layers.json`.

        Parameters
        ----------
        base : str
            Fingerprint of the base.
        layers : LayerMap
        forward : Mapping[str, float]
            FLOPs of one example's forward pass through each layer, by name.
        whole : float
            FLOPs of its forward pass through the model.
        """
        rows = [
            {
                "name": x.name,
                "kind": x.kind,
                "elements": x.elements,
                "bytes": x.bytes,
                "forward_flops": forward[x.name],
            }
            for x in layers.layers
        ]
        model = self.config.absolute().model
        content = {
            "base": {"name": model.name, "weights": model.weights, "fingerprint": base},
            "forward_flops": whole,
            "layers": rows,
        }
        write_json(self.path / "layers.json", content)

    def describe_data(self, content: Mapping[str, Any]) -> None:
        """Write who holds how many examples of what, `data.json`."""
        write_json(self.path / "data.json", content)

    def describe_result(self, content: Mapping[str, Any]) -> None:
        """Write the evaluation of the final model, `evaluation.json`.

        Each client that was ever evaluated on its own examples is there with its latest evaluation and
        that one's round: evaluating all clients at the end would send the model to all of them.

        Parameters
        ----------
        content : Mapping[str, Any]
            With `scores`, and with `groups`, the scores of each, if there are any.
        """
        found, metric = dict(content), self._metric
        # From the file, which also has what was stated before a run was resumed.
        clients = _client_scores(read_lines(self.path / "clients.jsonl"), content["scores"])
        if clients:
            found["clients"] = clients
        values = {
            "groups": {name: one.get(metric.name) for name, one in found.get("groups", {}).items()},
            "clients": {one["partition"]: one.get(metric.name) for one in clients},
        }
        spreads = {key: metric.spread(each) for key, each in values.items()}
        found["spread"] = {key: spread for key, spread in spreads.items() if spread}
        write_json(self.path / "evaluation.json", found)

    def on_start(self, rounds: int, before: RoundRecord, done: int = 0) -> None:
        """Note the main score, and the scores before the first round."""
        self._metric = before.metric
        if not self._scores:
            self._initial = before.accuracy
            self._before_training = dict(before.scores)

    def on_round(self, record: RoundRecord) -> None:
        """Append what the round left to the files that hold lines of each round."""
        line = metrics_line(record)
        with self._writing:
            if self._ended:  # the process may work on for some seconds
                return
            self._count(line)
            append_line(self.path / "metrics.jsonl", line)
            append_line(self.path / "ledger.jsonl", _ledger_line(record.round, record.ledger))
            append_line(self.path / "clients.jsonl", *_client_lines(record))
            if record.selection is not None:
                append_line(
                    self.path / "selection.jsonl", _selection_line(record, record.selection)
                )
            self._summarise("running")

    def _count(self, line: Mapping[str, Any]) -> None:
        """Add a line of `metrics.jsonl` to the run's totals."""
        for key in self._totals:
            self._totals[key] += line.get(key, 0)  # an earlier version may lack it
        self._failures += line["failures"]
        self._epsilon = {key: line[key] for key in self._epsilon}
        # Runs of earlier versions have these two scores.
        two = {key: line[key] for key in ("accuracy", "loss")}
        self._scores[line["round"]] = line.get("scores", two)

    def _values(self, name: str) -> dict[int, float]:
        """Return a score by round, without rounds that have none, or a loss that is no number."""
        rows = ((number, scores.get(name)) for number, scores in self._scores.items())
        return {n: value for n, value in rows if value is not None and not math.isnan(value)}

    def finish(self, base: str, tensors: Mapping[str, np.ndarray]) -> None:
        """Write the layers of the final model that differ from the base; mark the run as completed.

        Parameters
        ----------
        base : str
            Fingerprint of the base.
        tensors : Mapping[str, numpy.ndarray]
        """
        last = {"round": str(len(self._scores)), "base": base}
        write_tensors(self.path / "final.safetensors", tensors, last)
        self._summarise("completed")

    def _summarise(self, status: str, **more: Any) -> None:
        with self._writing:
            if self._ended:
                return
            config = self.config
            scored, main = self._values("accuracy"), self._values(self._metric.name)
            best = self._metric.best(main.values())
            write_json(
                self.path / "summary.json",
                {
                    "task": config.task.name,
                    "strategy": config.strategy.name,
                    "seed": config.run.seed,
                    "data": self.data,
                    "engine": self.engine,
                    "rounds": len(self._scores),
                    "initial_accuracy": self._initial,
                    "accuracy": next(reversed(scored.values()), None),
                    "best_accuracy": max(scored.values(), default=None),
                    "metric": self._metric.to_json(),
                    "best": None
                    if best is None
                    else {"round": next(r for r, v in main.items() if v == best), "value": best},
                    "initial_scores": self._before_training,
                    "scores": next((s for s in reversed(self._scores.values()) if s), {}),
                    "seconds": self._before + time.monotonic() - self._began,
                    **self._totals,
                    "failures": self._failures,
                    **self._epsilon,
                    "delta": config.privacy.delta if config.privacy.mode != "none" else None,
                    "repeated_rounds": self.repeated_rounds,
                    "status": status,
                    **more,
                    "versions": {
                        "python": platform.python_version(),
                        **{p: found for p in PACKAGES if (found := _version(p))},
                    },
                },
            )


def metrics_line(record: RoundRecord) -> dict[str, Any]:
    """Return the line of `metrics.jsonl` of a round."""
    total = record.ledger.total()
    return {
        "round": record.round,
        "accuracy": record.accuracy,
        "loss": record.loss,
        "scores": dict(record.scores),
        "groups": {name: dict(scores) for name, scores in record.groups.items()},
        "e1": record.e1,
        "e2": record.e2,
        "e2_masks": record.e2_masks,
        "update_norm": record.update_norm,
        "epsilon": _finite(record.epsilon),
        "epsilon_covers": record.epsilon_covers,
        "lr": record.lr,
        "server_lr": record.server_lr,
        "clients": record.replies,
        "late": record.late,
        "clipped": record.clipped,
        "failures": len(record.failures),
        "failure_reasons": [
            {"client": f.partition, "phase": f.phase, "reason": f.reason} for f in record.failures
        ],
        "seconds": record.seconds,
        "seconds_by_phase": record.seconds_by_phase,
        **{key: getattr(total, field) for key, field in TRAFFIC.items()},
        **record.metrics,
    }


def _version(package: str) -> str | None:
    """Return an installed package's version; a node or a server may do without some."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _finite(epsilon: float | None) -> float | str | None:
    """Write an infinite ε as "inf": JSON has no number for it, and `float` reads it."""
    return "inf" if epsilon == math.inf else epsilon


def _ledger_line(server_round: int, ledger: Ledger) -> dict[str, Any]:
    clients = sorted(ledger.rows)
    columns = {
        key: [getattr(ledger.rows[client], field) for client in clients]
        for key, field in TRAFFIC.items()
    }
    return {"round": server_round, "clients": clients, **columns}


def _client_lines(record: RoundRecord) -> list[dict[str, Any]]:
    """Return a line for each client of a round: its bytes, what it stated, and why it failed."""
    failures = {f.partition: f for f in record.failures}
    selection, ranks = record.selection, dict[int, dict[str, int]]()
    if selection is not None and selection.choice.ranks is not None:
        stated = zip(selection.clients, selection.choice.ranks.tolist(), strict=True)
        ranks = {client: {"rank": rank} for client, rank in stated}
    return [
        {
            "round": record.round,
            "client": client,
            **{key: getattr(traffic, field) for key, field in TRAFFIC.items()},
            "updated": list(record.updated.get(client, ())),
            **ranks.get(client, {}),
            **dict.fromkeys(METRICS, None),
            **record.numbers.rows.get(client, {}),
            "client_examples": record.numbers.examples(client, f"client_{LOSS.name}"),
            "failed": failures[client].phase if client in failures else None,
            "reason": failures[client].reason if client in failures else None,
        }
        for client, traffic in sorted(record.ledger.rows.items())
    ]


def _client_scores(
    lines: Iterable[Mapping[str, Any]], names: Iterable[str]
) -> list[dict[str, Any]]:
    """Return what each client stated last of the model on its own examples, with the round."""
    latest = {row["client"]: row for row in lines if row.get("client_examples")}
    return [
        {
            "partition": client,
            "round": row["round"],
            "examples": row["client_examples"],
            **{n: row[key] for n in names if row.get(key := f"client_{n}") is not None},
        }
        for client, row in sorted(latest.items())
    ]


def _selection_line(round_record: RoundRecord, record: SelectionRecord) -> dict[str, Any]:
    choice = record.choice
    masks = choice.masks.astype(int).tolist()
    updated = [
        [int(layer in round_record.updated.get(client, ())) for layer in record.layers]
        for client in record.clients
    ]
    solved = {"objective": choice.objective, "bound": choice.bound, "gap": choice.gap}
    line: dict[str, Any] = {
        "round": round_record.round,
        "clients": list(record.clients),
        "budgets": record.budgets.tolist(),
        "costs": _short(record.costs),
        "layers": list(record.layers),
        "masks": masks,
        "statistics": _tables(record.statistics),
        # A user's strategy may state numbers of NumPy's types.
        **{name: None if number is None else float(number) for name, number in solved.items()},
        "rounding": choice.rounding,
        "solver": choice.solver,
        "seconds": record.seconds,
    }
    # What is out of the ordinary: lines stay short where it is not.
    if record.depth_costs.any():
        line["depth_costs"] = _short(record.depth_costs)
    if choice.schedules is not None:
        line["schedules"] = [masks.astype(int).tolist() for masks in choice.schedules]
    if choice.consistency is not None:
        line |= {"consistency": choice.consistency, "disagreement": choice.disagreement}
    if choice.ranks is not None:
        line["ranks"] = choice.ranks.tolist()
    if choice.sent is not None:
        line["sent"] = choice.sent.astype(int).tolist()
    if record.runs is not None:
        line["runs"] = record.runs.astype(int).tolist()
    if record.held:
        line["held"] = list(record.held)
    if record.measured is not None:
        line["measured"] = record.measured.tolist()
    if record.assumed:
        line["assumed"] = _tables(record.assumed)
    if updated != masks:
        line["updated"] = updated
    return line


def _tables(statistics: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: table.tolist() for name, table in statistics.items()}


def _short(table: np.ndarray) -> list[Any]:
    """Write an (n, L) table as one row where all rows are the same."""
    same = bool((table == table[0]).all())
    return (table[0] if same else table).tolist()  # type: ignore[no-any-return]
