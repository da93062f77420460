"""Spreading a training set over clients, through flwr-datasets."""

from __future__ import annotations

import warnings

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, Partitioner

from layerfed.config import ConfigError, RunConfig
from layerfed.seeding import Stream, torch_seed

__all__ = ["partition_indices"]

# A Dirichlet draw in which some client holds less than this is drawn again.
MIN_EXAMPLES = 8


def partition_indices(labels: np.ndarray, config: RunConfig) -> list[np.ndarray]:
    """Return each client's example indices; disjoint, and together all of them.

    Parameters
    ----------
    labels : numpy.ndarray
        Class of each training example, shape (N,).
    config : RunConfig
        `task.partition`, `task.alpha`, `federation.clients`, `run.seed`.

    Raises
    ------
    ConfigError
        If there are more clients than examples, or no draw leaves every client enough of them.
    """
    clients, seed = config.federation.clients, torch_seed(config.run.seed, Stream.PARTITION)
    if clients > len(labels):
        raise ConfigError(
            f"federation.clients = {clients} is above the {len(labels)} training examples; lower it"
        )
    partitioner: Partitioner
    if config.task.partition == "iid":
        partitioner = IidPartitioner(clients)
    else:
        partitioner = DirichletPartitioner(
            clients, "label", config.task.alpha, MIN_EXAMPLES, seed=seed % 2**32
        )
    # Only labels and indices go through the partitioner; the examples themselves stay where they are.
    order = np.random.default_rng(seed).permutation(len(labels))
    partitioner.dataset = Dataset.from_dict({"label": labels[order], "index": order})
    try:
        with warnings.catch_warnings():
            # It warns of each draw that is made again; the one that counts is the last.
            warnings.simplefilter("ignore", UserWarning)
            parts = [
                np.sort(np.asarray(partitioner.load_partition(i)["index"])) for i in range(clients)
            ]
    except ValueError:
        parts = []  # flwr-datasets gives up after ten draws
    if not parts or min(len(part) for part in parts) < MIN_EXAMPLES:
        skew = f"task.alpha = {config.task.alpha:g} and " * (config.task.partition == "dirichlet")
        raise ConfigError(
            f"{skew}federation.clients = {clients} leave some client with fewer than {MIN_EXAMPLES} of "
            f"{len(labels)} examples; {'raise task.alpha or ' * bool(skew)}lower federation.clients"
        )
    return parts
