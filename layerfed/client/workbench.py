"""The state that a client's process keeps between messages, and a node's view of a run.

A `Workbench` holds the task's data and one resident model. It is built once for each process and
configuration, because building and loading a foundation model costs far more than a round of work on a
few of its layers.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from logging import INFO, WARNING
from typing import cast

import numpy as np
import torch
from flwr.app import Context
from flwr.common.logger import log
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from layerfed.client.costs import MeasuredUnit, measure_costs, step_cost
from layerfed.client.devices import choose_device, chosen_precision
from layerfed.client.limits import Allowance, LayerCosts, free_memory
from layerfed.client.memory import rows_that_fit
from layerfed.client.objective import objective
from layerfed.client.prefix import PrefixCache
from layerfed.client.resident import ResidentModel
from layerfed.client.training import LossFn, Step
from layerfed.config import BudgetUnit, ConfigError, Flat, NodeConfig, RunConfig, Scalar
from layerfed.exchange import LayerStore, open_store
from layerfed.models.layers import layer_costs
from layerfed.privacy.protection import Protection
from layerfed.task import Batch, Examples, Task, load_task

__all__ = [
    "Node",
    "Workbench",
    "forget_workbenches",
    "node_store",
    "run_config_of",
    "workbench",
]


# Bytes of a GPU that the driver's context and the libraries' workspaces take in each process.
CUDA_PROCESS = 6e8
# A step that takes longer is measured once.
WARM_SECONDS = 5.0


class Workbench:
    """The task's data and one resident model, which a process keeps between messages."""

    def __init__(self, config: RunConfig, *, own_data: bool = False) -> None:
        self.config = config
        self.task: Task = load_task(config)
        self.task.own_data = own_data
        self.device = choose_device(config.run.device)
        self.resident = ResidentModel(
            self.task.build_model,
            self.task.layers,
            self.device,
            config.model.storage,
            self.task.adapted,
        )
        train = config.train
        self.step = Step(
            chosen_precision(train.precision, self.device), train.micro_batch, train.checkpointing
        )
        """How a step of training is computed on this device."""
        norms = [m for m in self.resident.model.modules() if isinstance(m, _BatchNorm)]
        if config.model.frozen_statistics and any(map(_untrained, norms)):
            log(
                WARNING,
                "BatchNorm's statistics have never been trained, and stay as they are; if the model has "
                "new weights, set model.batch-norm=trained",
            )
        if train.micro_batch and not config.model.frozen_statistics and norms:
            raise ConfigError(
                f"train.micro-batch = {train.micro_batch}: model.name = '{config.model.name}' has "
                "BatchNorm, whose statistics are those of a whole batch; set it to 0 and lower "
                "train.batch-size, or set model.batch-norm=frozen"
            )
        self.prefix: PrefixCache | None = None
        """The outputs of frozen blocks, if the run keeps them."""
        if train.prefix_cache and train.augment != "none":
            log(INFO, "train.prefix-cache keeps nothing: train.augment changes every example")
        elif train.prefix_cache:
            self.prefix = PrefixCache(self.resident, 1e6 * train.prefix_cache)
        self._examples: dict[int, tuple[Examples, Examples]] = {}
        self._losses: dict[int, LossFn] = {}
        self._costs: dict[object, tuple[np.ndarray, np.ndarray]] = {}

    def examples(self, partition: int) -> tuple[Examples, Examples]:
        """Return a client's training and held-out examples."""
        if partition not in self._examples:
            self._examples[partition] = self.task.client_examples(partition)
        return self._examples[partition]

    def loss(self, partition: int) -> LossFn:
        """Return the loss that a client trains and probes."""
        if partition not in self._losses:
            examples, _ = self.examples(partition)
            self._losses[partition] = objective(self.task, self.resident.model, examples)
        return self._losses[partition]

    @property
    def logits(self) -> Callable[[nn.Module, Batch], Tensor]:
        """The task's forward pass for an evaluation of the model as it is now."""
        return self.prefix.evaluating(self.task.logits) if self.prefix else self.task.logits

    def costs(self, partition: int, unit: MeasuredUnit) -> tuple[np.ndarray, np.ndarray]:
        """Return c_l and D_l, measured on this device once for batches of a shape; shape (L,) each."""
        batch = self._batch(partition)
        key = unit, tuple((name, tuple(tensor.shape)) for name, tensor in batch.items())
        if key not in self._costs:
            self._costs[key] = measure_costs(
                self.resident.model,
                self.resident.layers,
                batch,
                self.task.loss,
                unit,
                how=self.step,
            )
        return self._costs[key]

    @cached_property
    def first_step(self) -> tuple[float, float]:
        """Bytes that the first client needs, and seconds of its step on all blocks; measured once."""

        def measured() -> tuple[float, float]:
            began = time.perf_counter()
            needed = self.memory_needed(0)
            # On a GPU the measurement makes two steps.
            return needed, (time.perf_counter() - began) / (2 if self.device.type == "cuda" else 1)

        needed, seconds = measured()
        # The first step loads libraries and fills caches, which does not matter to a slow one.
        return measured() if seconds < WARM_SECONDS else (needed, seconds)

    @cached_property
    def evaluation_rows(self) -> int:
        """The rows of an evaluation's batch if `run.evaluate-batch` is 0; counted once."""
        return rows_that_fit(self.task, self.resident.model, self.device)

    def head_memory(self, partition: int) -> float:
        """Return the bytes of a training step on the head alone, on this device."""
        return self._step_memory(partition, [])

    def memory_needed(self, partition: int, blocks: Iterable[str] | None = None) -> float:
        """Return the bytes that a client's process needs on this device.

        They are those of the model, of a step, of copies of the trained layers and of the optimiser's
        state, and on a GPU of the process itself.

        Parameters
        ----------
        partition : int
        blocks : Iterable[str], optional
            Names of the blocks that the client trains; by default all.

        Returns
        -------
        float
            Infinity if the device cannot even take one such step.
        """
        layers, train = self.resident.layers, self.config.train
        chosen = [block.name for block in layers.blocks] if blocks is None else list(blocks)
        try:
            step = self._step_memory(partition, chosen)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            return math.inf
        # θ^t of the trained layers is kept beside them.
        copies = 1 + (2 if train.optimizer == "adamw" else bool(train.momentum))
        trained = sum(layers[name].trained_bytes for name in [*chosen, layers.head.name])
        model = self.resident.nbytes
        process = CUDA_PROCESS if self.device.type == "cuda" else 0.0
        return model + step + copies * trained + process

    def _step_memory(self, partition: int, blocks: Iterable[str]) -> float:
        return step_cost(
            self.resident.model,
            self.resident.layers,
            blocks,
            self._batch(partition),
            self.task.loss,
            "memory",
            how=self.step,
        )

    def _batch(self, partition: int) -> Batch:
        size = self.config.train.batch_size
        return next(self.examples(partition)[0].in_order(size, self.device))


@lru_cache(maxsize=64)
def _parsed(items: tuple[tuple[str, type, Scalar], ...]) -> RunConfig:
    return RunConfig.from_flat({key: value for key, _, value in items})


def _untrained(norm: _BatchNorm) -> bool:
    """Return whether the running statistics are those of a new module."""
    mean, var = norm.running_mean, norm.running_var
    return mean is not None and var is not None and not mean.any() and bool((var == 1).all())


def run_config_of(flat: Flat) -> RunConfig:
    """Return a checked run configuration. It is checked once, since every message brings the same."""
    # The cache key has types, since True and 1 are equal as keys.
    return _parsed(tuple([(key, type(value), value) for key, value in flat.items()]))


@lru_cache(maxsize=2)
def _workbench(config: RunConfig, own_data: bool) -> Workbench:
    return Workbench(config, own_data=own_data)


def workbench(flat: Flat, node: NodeConfig | None = None) -> Workbench:
    """Return the process's workbench for a run configuration and a node's own settings.

    Runs that differ only in strategy, budget or name share one workbench, so a sweep in one process
    loads data and model once.
    """
    config = run_config_of(flat)
    if node is not None:
        config = node.applied_to(config)
    # A relative path means other data once the process has another working folder.
    config = config.absolute()
    defaults = RunConfig()
    shared = config.model_copy(
        update={
            "strategy": defaults.strategy,
            "budget": defaults.budget,
            # Stacking changes what a layer holds.
            "server": config.server if config.server.aggregation == "stack" else defaults.server,
            "exchange": defaults.exchange,
            "privacy": defaults.privacy,
            "secagg": defaults.secagg,
            "run": defaults.run.model_copy(
                update={"seed": config.run.seed, "device": config.run.device}
            ),
        }
    )
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    return _workbench(shared, node is not None and node.own_data is not None)


def forget_workbenches() -> None:
    """Free the data and models that this process keeps."""
    _workbench.cache_clear()
    gc.collect()  # a model's modules refer to one another
    torch.cuda.empty_cache()


def node_store(context: Context) -> LayerStore:
    """Return the layer store of a node or of the server, from its own settings or else the run's."""
    section = run_config_of(context.run_config).exchange
    store = context.node_config.get("store") or section.store
    size = context.node_config.get("store-size") or section.store_size
    return open_store(str(store), float(cast(float, size)))


@dataclass(frozen=True)
class Node:
    """One node in one run: its own settings, the run's settings, and its workbench.

    Attributes
    ----------
    settings : NodeConfig
    run : RunConfig
        The configuration that the server sent. In `bench.config` the node's own settings replace some.
    bench : Workbench
    protection : Protection | None
        The clipping and noise on everything that the node sends; None if nothing is private.
    context : flwr.app.Context
    """

    settings: NodeConfig
    run: RunConfig
    bench: Workbench
    protection: Protection | None
    context: Context

    @classmethod
    def of(cls, context: Context) -> Node:
        """Read the node's settings and the run's, and find or build the workbench.

        Raises
        ------
        ConfigError
            If a setting is not allowed.
        """
        settings = NodeConfig.read(context.node_config)
        run = run_config_of(context.run_config)
        bench = workbench(context.run_config, settings)
        return cls(settings, run, bench, Protection.of(run.privacy, settings), context)

    @property
    def partition(self) -> int:
        """The client's id."""
        return self.settings.partition_id

    @property
    def store(self) -> LayerStore:
        """The node's store for layers between messages."""
        return node_store(self.context)

    def stated(self, examples: int) -> int:
        """Return the number of examples that the client states; a private client always states one."""
        hidden = self.protection is not None and self.protection.hides_examples
        return 1 if hidden else examples

    def allowance(self, *, again: bool = False) -> Allowance | None:
        """Return this node's budget in the run. It is computed once, unless `again` is set."""
        # Runs with different budget units share a workbench, so the unit comes from the run.
        unit, bench = self.run.budget.unit, self.bench
        if not again and (known := Allowance.recall(self.context.state, unit)) is not None:
            return known

        def costs(unit: BudgetUnit) -> LayerCosts:
            same = layer_costs(bench.resident.layers, unit)
            if same is not None:
                return LayerCosts(same, np.zeros_like(same))
            return LayerCosts(*bench.costs(self.partition, cast(MeasuredUnit, unit)))

        found = Allowance.of(
            self.settings,
            unit,
            costs,
            free=lambda: free_memory(bench.device),
            head=lambda: bench.head_memory(self.partition),
        )
        if found is not None:
            found.remember(self.context.state)
        return found
