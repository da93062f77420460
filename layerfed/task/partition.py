"""The split of a training set into clients' partitions, by flwr-datasets."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from layerfed.config import ConfigError, RunConfig
from layerfed.config.errors import naming_extras
from layerfed.config.seeding import Stream, torch_seed
from layerfed.models.block_finder import some
from layerfed.task.prepared import prepared

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

__all__ = ["partition_indices"]

# A Dirichlet draw that leaves a client fewer examples than this is drawn again.
MIN_EXAMPLES = 8


def partition_indices(
    labels: np.ndarray,
    config: RunConfig,
    groups: np.ndarray | None = None,
    group_names: Sequence[str] = (),
) -> list[np.ndarray]:
    """Return each client's example indices; disjoint, and together all of them.

    Parameters
    ----------
    labels : numpy.ndarray
        Class of each training example, shape (N,).
    config : RunConfig
        `task.partition`, `task.alpha`, `federation.clients`, `run.seed`.
    groups : numpy.ndarray, optional
        The group of each example (its domain, language, …) as a position in `group_names`, shape (N,).
        `task.partition = "by-column"` uses it: a client holds examples of one group, each group has the
        same number of neighbouring clients, and its examples are spread over them at random.
    group_names : Sequence[str]

    Raises
    ------
    ConfigError
        If there are more clients than examples or fewer than groups, or if no draw leaves every client
        enough examples.
    """
    clients = config.federation.population
    if clients > len(labels):
        raise ConfigError(
            f"federation.clients = {clients} is above the {len(labels)} training examples; lower it"
        )

    def make() -> dict[str, np.ndarray]:
        parts = _drawn(labels, config, groups, group_names)
        ends = np.cumsum([len(part) for part in parts])
        return {"indices": np.concatenate(parts), "ends": ends}

    with naming_extras(f"task.partition = '{config.task.partition}'"):
        found = prepared(_key(labels, config, groups, group_names), make)
    return np.split(found["indices"], found["ends"][:-1])


def _key(
    labels: np.ndarray, config: RunConfig, groups: np.ndarray | None, group_names: Sequence[str]
) -> dict[str, object]:
    return {
        "what": "partition",
        "flwr-datasets": version("flwr-datasets"),
        "kind": config.task.partition,
        "alpha": config.task.alpha,
        "clients": config.federation.clients,
        "seed": config.run.seed,
        "least": MIN_EXAMPLES,
        "labels": labels,
        "groups": groups,
        "names": tuple(group_names),
    }


def _drawn(
    labels: np.ndarray, config: RunConfig, groups: np.ndarray | None, group_names: Sequence[str]
) -> list[np.ndarray]:
    # Imported late: it imports `datasets`, which takes seconds, and most processes do not need it.
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner

    clients, seed = config.federation.population, torch_seed(config.run.seed, Stream.PARTITION)
    if config.task.partition == "by-column":
        return _by_group(groups, group_names, config, seed)
    partitioner: Partitioner
    if config.task.partition == "iid":
        partitioner = IidPartitioner(clients)
    else:
        partitioner = DirichletPartitioner(
            clients, "label", config.task.alpha, MIN_EXAMPLES, seed=seed % 2**32
        )
    parts = _cut(partitioner, labels, seed)
    if not parts or min(len(part) for part in parts) < MIN_EXAMPLES:
        skew = f"task.alpha = {config.task.alpha:g} and " * (config.task.partition == "dirichlet")
        raise ConfigError(
            f"{skew}federation.clients = {clients} leave some client with fewer than {MIN_EXAMPLES} of "
            f"{len(labels)} examples; {'raise task.alpha or ' * bool(skew)}lower federation.clients"
        )
    return parts


def _cut(partitioner: Partitioner, labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """Return a partitioner's cut of the examples; empty if it gives up."""
    from datasets import Dataset

    # The partitioner gets only labels and indices, and no example is copied.
    order = np.random.default_rng(seed).permutation(len(labels))
    partitioner.dataset = Dataset.from_dict({"label": labels[order], "index": order})
    try:
        with warnings.catch_warnings():
            # It warns of each draw that is repeated; only the last one counts.
            warnings.simplefilter("ignore", UserWarning)
            return [
                np.sort(partitioner.load_partition(i).with_format("numpy")[:]["index"])
                for i in range(partitioner.num_partitions)
            ]
    except ValueError:
        return []  # flwr-datasets gives up after ten draws


def _by_group(
    groups: np.ndarray | None, names: Sequence[str], config: RunConfig, seed: int
) -> list[np.ndarray]:
    from flwr_datasets.partitioner import IidPartitioner

    clients = config.federation.population
    if groups is None:
        raise ConfigError(
            f"task.partition = 'by-column', but the examples of task.name = '{config.task.name}' have "
            "no groups; use dirichlet or iid, or name a column of groups where the task reads one "
            "(task.group-column)"
        )
    if clients < len(names):
        raise ConfigError(
            f"federation.clients = {clients} is below the {len(names)} groups of task.partition = "
            f"'by-column' ({some(names)}); raise it, or choose fewer groups (task.groups)"
        )
    shares = np.array_split(np.arange(clients), len(names))
    parts: list[np.ndarray] = []
    for group, share in enumerate(shares):
        members = np.flatnonzero(groups == group)
        if len(members) < MIN_EXAMPLES * len(share):
            raise ConfigError(
                f"group '{names[group]}' has {len(members)} training examples for {len(share)} clients, "
                f"fewer than {MIN_EXAMPLES} each; lower federation.clients = {clients}, or leave the "
                "group out (task.groups)"
            )
        cut = _cut(IidPartitioner(len(share)), np.zeros(len(members), np.int64), seed + group)
        parts += [members[part] for part in cut]
    return parts
