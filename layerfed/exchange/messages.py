"""The message protocol: the content of each message, and the functions that write and read it.

Every instruction has a `config` record. An instruction that concerns the model also has the `manifest`
(the version of each layer), and the `arrays` of layers that the node is not known to hold:

=============== ============================================= =====================================
message type    config                                        reply
=============== ============================================= =====================================
query.describe                                                partition, partitions, examples, budget
query.probe     round, and that of a `Probe`                  examples; for each statistic one
                                                              number for each block asked for
train           that of a `TrainInstruction`                  arrays: Δ of the trained layers,
                                                              encoded; examples; statistics, if
                                                              they are asked for
evaluate        round                                         examples
=============== ============================================= =====================================

An instruction that concerns the model also says, in `client` and `examples`, for whom the server takes
the node; one that has become another meanwhile refuses.

A reply also states the metrics of its phase (`exchange/metrics.py`). Secure sums add queries of their
own (`secure/messages.py`).

Each reply also has a `layers` record. It names the manifest's versions that the node keeps, and its
store. Or it names, in place of an answer, the layers that the node is *missing*; these are sent again.

Replies come from untrusted machines. Reading a reply checks it in full, and raises `RefusedReply` with
the reason. Nothing in a reply is unpickled, used as a path, or trusted for a size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from layerfed.exchange.arrays import RefusedReply, decode, record_of
from layerfed.exchange.bounds import MAX_STATISTIC, check_values, number, row_of
from layerfed.exchange.codecs import CODECS, Codec
from layerfed.exchange.metrics import METRICS, Metric
from layerfed.models.layers import LayerMap

__all__ = [
    "WRONG_SETTINGS",
    "Description",
    "Manifest",
    "TrainReply",
    "describe_reply",
    "evaluate_reply",
    "has_manifest",
    "instruction",
    "missing_reply",
    "probe_reply",
    "read_config",
    "read_description",
    "read_evaluation",
    "read_held",
    "read_manifest",
    "read_metrics",
    "read_missing",
    "read_statistics",
    "read_train_reply",
    "state_held",
    "statistics_of",
    "train_reply",
]

# A client's weight in the mean is its example count, which it states itself; a larger one is refused.
MAX_EXAMPLES = 2**29
# Partition ids are row numbers of a population.
MAX_PARTITION = 2**31
# No model has more layers.
MAX_HELD = 100_000
# LayerFed's error code of a node whose settings cannot be run; it is not asked again.
WRONG_SETTINGS = 1000


@dataclass(frozen=True)
class Manifest:
    """The name of a global model: the base's fingerprint and each layer's content digest.

    `codec` says in what layers come with the message: as changes since the base (`codecs.written`), or
    as they are if it is "float32".
    """

    base: str
    digests: Mapping[str, str]
    codec: str = "float32"


@dataclass(frozen=True)
class Description:
    """A client's description of itself.

    `budget` is None if the node has no budget of its own. `partitions`, the number of parts of the data,
    is None if the node does not know it. `costs` and `depth_costs`, L numbers each, are the costs of
    training a layer on this device; they are stated if budgets are in a measured unit.
    """

    partition: int
    examples: int
    budget: float | None = None
    partitions: int | None = None
    costs: tuple[float, ...] | None = None
    depth_costs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class TrainReply:
    """A checked training reply: Δ_i (eq. 4) of the trained layers' tensors, and d_i."""

    update: Mapping[str, np.ndarray]
    examples: int
    metrics: Mapping[str, float]


# ------------------------------------------------------------------------------- instructions
def instruction(
    kind: str,
    node: int,
    *,
    server_round: int,
    timeout: float,
    manifest: Manifest | None = None,
    arrays: ArrayRecord | None = None,
    config: Mapping[str, Any] | None = None,
) -> Message:
    """Build a message to one node; `config` values must fit a `ConfigRecord`."""
    content = RecordDict({"config": ConfigRecord({**(config or {}), "round": server_round})})
    if manifest is not None:
        coded = {} if manifest.codec == "float32" else {"codec": manifest.codec}
        content["manifest"] = ConfigRecord({"base": manifest.base, **coded, **manifest.digests})
    if arrays is not None:
        content["arrays"] = arrays
    return Message(content, node, kind, group_id=str(server_round), ttl=timeout)


def has_manifest(message: Message) -> bool:
    """Return whether an instruction concerns the model."""
    return message.has_content() and "manifest" in message.content.config_records


def read_manifest(message: Message) -> tuple[Manifest, ArrayRecord]:
    """Return an instruction's manifest, and the arrays that came with it."""
    entries = {str(k): str(v) for k, v in message.content.config_records["manifest"].items()}
    base, codec = entries.pop("base"), entries.pop("codec", "float32")
    arrays = message.content.array_records.get("arrays", ArrayRecord())
    return Manifest(base=base, digests=entries, codec=codec), arrays


def read_config(message: Message) -> Mapping[str, Any]:
    """Return an instruction's `config` record; the table above has its entries."""
    return message.content.config_records["config"]


# ------------------------------------------------------------------------------------ replies
def describe_reply(message: Message, description: Description) -> Message:
    """Answer `query.describe`."""
    metrics: dict[str, int | float | list[float]] = {
        "partition": description.partition,
        "examples": description.examples,
    }
    if description.budget is not None:
        metrics["budget"] = description.budget
    if description.partitions is not None:
        metrics["partitions"] = description.partitions
    if description.costs is not None and description.depth_costs is not None:
        metrics["costs"] = list(description.costs)
        metrics["depth_costs"] = list(description.depth_costs)
    return Message(RecordDict({"metrics": MetricRecord(cast(Any, metrics))}), reply_to=message)


def probe_reply(
    message: Message, statistics: Mapping[str, Sequence[float]], examples: int, **costs: float
) -> Message:
    """Answer `query.probe` with a list of numbers for each statistic, one for each block asked for."""
    content = RecordDict(
        {
            "statistics": _record_of(statistics),
            "metrics": MetricRecord(cast(Any, {"examples": examples, **costs})),
        }
    )
    return Message(content, reply_to=message)


def _record_of(statistics: Mapping[str, Sequence[float]]) -> MetricRecord:
    return MetricRecord({name: list(row) for name, row in statistics.items()})


def train_reply(
    message: Message,
    update: Mapping[str, np.ndarray],
    examples: int | None,
    statistics: Mapping[str, Sequence[float]] | None = None,
    **metrics: float,
) -> Message:
    """Answer `train` with the encoded Δ_i of the trained layers, and the metrics of the work.

    `examples` is None in a secure sum, in which the number is hidden in the arrays. `statistics` are
    those that were to be measured after training.
    """
    stated = {} if examples is None else {"examples": examples}
    content = RecordDict(
        {
            "arrays": record_of(update),
            "metrics": MetricRecord(cast(Any, {**stated, **metrics})),
        }
    )
    if statistics is not None:
        content["statistics"] = _record_of(statistics)
    return Message(content, reply_to=message)


def missing_reply(message: Message, layers: Iterable[str]) -> Message:
    """Answer any instruction with the layers that the node lacks; the server sends them again."""
    return Message(
        RecordDict({"layers": ConfigRecord({"missing": list(layers)})}), reply_to=message
    )


def state_held(reply: Message, held: Iterable[str], store: str) -> None:
    """Add to a reply the digests of the layer versions that the node keeps, and its store."""
    record = reply.content.config_records.setdefault("layers", ConfigRecord())
    record["held"], record["store"] = list(held), store


def evaluate_reply(message: Message, examples: int, **metrics: float) -> Message:
    """Answer `evaluate`."""
    record = MetricRecord(cast(Any, {"examples": examples, **metrics}))
    return Message(RecordDict({"metrics": record}), reply_to=message)


# ---------------------------------------------------------------------------- reading replies
def read_metrics(
    message: Message, *, required: Iterable[str], declared: Mapping[str, Metric] = METRICS
) -> dict[str, float]:
    """Return a reply's metrics; refuse them if one is not finite or a required one is missing."""
    record = message.content.metric_records.get("metrics")
    if record is None:
        raise RefusedReply("it has no 'metrics' record")
    numbers = {k: number(v) for k, v in record.items() if isinstance(v, (int, float))}
    if absent := [name for name in required if name not in numbers]:
        raise RefusedReply(f"its metrics lack {', '.join(absent)}")
    if bad := [name for name, value in numbers.items() if not math.isfinite(value)]:
        raise RefusedReply(f"its metrics are not finite: {', '.join(bad)}")
    if bad := [name for name, value in numbers.items() if abs(value) > MAX_STATISTIC]:
        raise RefusedReply(f"its metrics are too large: {', '.join(bad)}")
    known = {**METRICS, **declared}
    for name, value in numbers.items():
        if name not in known:
            continue
        least, most = known[name].least, known[name].most
        if not least <= value <= most:
            bound = f"{least:g} or more" if value < least else f"{most:g} or less"
            raise RefusedReply(f"it states {name} = {value:g}; {bound} is allowed")
    return numbers


def _examples(metrics: Mapping[str, float]) -> int:
    examples = metrics["examples"]
    if not 1 <= examples <= MAX_EXAMPLES or examples != int(examples):
        raise RefusedReply(f"it states {examples:g} examples; 1 to {MAX_EXAMPLES} are allowed")
    return int(examples)


def read_description(message: Message, num_blocks: int | None = None) -> Description:
    """Read the answer to `query.describe`; costs are read only if `num_blocks`, L, is given."""
    metrics = read_metrics(message, required=("partition", "examples"))
    budget = metrics.get("budget")
    if budget is not None and budget < 0:
        raise RefusedReply(f"it states a budget of {budget:g}")
    for name in ("partition", "partitions"):
        value = metrics.get(name, 0.0)
        if not 0 <= value <= MAX_PARTITION or value != int(value):
            raise RefusedReply(f"it states '{name}' {value:g}")
    partitions = int(metrics["partitions"]) if "partitions" in metrics else None
    costs, depth_costs = _costs(message, num_blocks)
    return Description(
        partition=int(metrics["partition"]),
        examples=_examples(metrics),
        budget=budget,
        partitions=partitions,
        costs=costs,
        depth_costs=depth_costs,
    )


def _costs(
    message: Message, num_blocks: int | None
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    record = message.content.metric_records["metrics"]
    if num_blocks is None or ("costs" not in record and "depth_costs" not in record):
        return None, None
    costs, depth = (
        tuple(row_of(record.get(name), num_blocks, f"'{name}'").tolist())
        for name in ("costs", "depth_costs")
    )
    if any(low < high for low, high in pairwise(depth)):
        raise RefusedReply("its 'depth_costs' rise towards the output")
    return costs, depth


def read_statistics(
    message: Message, names: Iterable[str], num_blocks: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Read the answer to `query.probe`: the statistics, and the metrics beside them."""
    metrics = read_metrics(message, required=("examples",))
    _examples(metrics)
    return statistics_of(message, names, num_blocks), metrics


def statistics_of(message: Message, names: Iterable[str], num_blocks: int) -> dict[str, np.ndarray]:
    """Return a reply's statistics, float64 of shape (K,) each, for the K blocks that were asked for."""
    record = message.content.metric_records.get("statistics")
    if record is None:
        raise RefusedReply("it has no 'statistics' record")
    return {name: row_of(record.get(name), num_blocks, f"statistic '{name}'") for name in names}


def read_train_reply(
    message: Message, expected: Mapping[str, np.ndarray], codec: Codec = CODECS["float32"]
) -> TrainReply:
    """Read and check a training reply.

    Parameters
    ----------
    message : Message
        A reply with content.
    expected : Mapping[str, numpy.ndarray]
        The global tensors that this client was asked to train. The reply must hold the updates of all
        of them and nothing else.
    codec : Codec
        The codec that the client was asked to use.

    Raises
    ------
    RefusedReply
        If names, shapes, dtypes, values or the example count are not allowed.
    """
    metrics = read_metrics(message, required=("examples",))
    examples = _examples(metrics)
    record = message.content.array_records.get("arrays", ArrayRecord())
    due = {name: codec.parts_of(name, like) for name, like in expected.items()}
    names = {part for parts in due.values() for part in parts}
    if extra := list(islice((name for name in record if name not in names), 3)):
        raise RefusedReply(f"it holds tensors it was not asked to train: {', '.join(extra)}")
    if absent := sorted(name for name in names if name not in record):
        raise RefusedReply(f"it lacks tensors it was asked to train: {', '.join(absent[:3])}")
    update = {}
    for name, parts in due.items():
        arrays = {}
        for part, (shape, dtype) in parts.items():
            try:
                arrays[part] = decode(record[part], shape, dtype)
            except RefusedReply as error:
                raise RefusedReply(f"'{part}' is {error}") from None
        with np.errstate(over="ignore", invalid="ignore"):
            update[name] = codec.decode(name, expected[name], arrays)
        check_values(name, update[name])
    return TrainReply(update, examples, metrics)


def read_evaluation(
    message: Message, declared: Mapping[str, Metric] = METRICS
) -> tuple[int, dict[str, float]]:
    """Read the answer to `evaluate`: the number of examples and the metrics over them.

    Parameters
    ----------
    message : Message
    declared : Mapping[str, Metric]
        The metrics of the task's scores (`client_metrics`).
    """
    names = [m.name for m in declared.values() if m.phase == "evaluate" and m.required]
    metrics = read_metrics(message, required=("examples", *names), declared=declared)
    return _examples(metrics), metrics


def read_missing(message: Message, layers: LayerMap) -> tuple[str, ...]:
    """Return the layers that a reply says are missing; () if the reply is an answer."""
    record = message.content.config_records.get("layers")
    missing = record.get("missing", []) if record is not None else []
    if not isinstance(missing, list) or not set(missing) <= set(layers.names):
        raise RefusedReply("it misses layers that the model does not have")
    return tuple(dict.fromkeys(str(name) for name in missing))


def read_held(message: Message) -> tuple[tuple[str, ...], str]:
    """Return the digests that a node says it keeps, and the identity of its store."""
    record = message.content.config_records.get("layers")
    held = record.get("held", []) if record is not None else []
    store = record.get("store", "") if record is not None else ""
    if not isinstance(held, list) or len(held) > MAX_HELD or not isinstance(store, str):
        raise RefusedReply("its statement of the layers it holds cannot be read")
    return tuple(str(digest) for digest in held), store
