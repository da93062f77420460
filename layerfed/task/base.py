"""The interface between LayerFed and a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from layerfed.config import (
    FAMILIES,
    ConfigError,
    RunConfig,
    Section,
    TaskConfig,
    explain,
    nearest,
    nearest_key,
    section_keys,
)
from layerfed.config.seeding import Stream, generator
from layerfed.digests import content_digest, digest
from layerfed.exchange.metrics import METRICS
from layerfed.exchange.scores import LOSS, TAKEN, Score
from layerfed.models.adapters import adapted_layers, insert_adapters
from layerfed.models.layers import LayerMap, LayerMapError
from layerfed.models.trace import Forward
from layerfed.task.scoring import SingleLabel, Tally

__all__ = ["Batch", "Examples", "InMemory", "Inputs", "Store", "Task"]

Batch = Mapping[str, Tensor]

# Settings that every task reads. Tasks without groups refuse `by-column`.
COMMON = {"name", "metric", "options", "partition", "alpha", "local_test"}
# The group of examples that belong to none of a task's groups.
OTHER = "other"


class Store(Protocol):
    """A place for examples: memory, or a memory-mapped file that processes share."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def batch(self, indices: np.ndarray) -> Batch:
        """Return the examples at `indices`, in this order, as tensors of equal first dimension."""

    def column(self, name: str) -> np.ndarray:
        """Return the values of a column of numbers, such as `label`, shape (N,)."""


@dataclass(frozen=True)
class InMemory:
    """A store of named tensors with equal first dimension, in memory."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(next(iter(self.tensors.values())))

    def batch(self, indices: np.ndarray) -> Batch:
        """Return some of the examples."""
        index = torch.as_tensor(indices)
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def column(self, name: str) -> np.ndarray:
        """Return the values of a column of numbers."""
        return self.tensors[name].numpy()


@dataclass(frozen=True)
class Examples:
    """Some of a store's examples, held as indices and never as a copy of the data.

    Attributes
    ----------
    store : Store
    indices : numpy.ndarray
        Positions in the store, shape (N,), int64.
    """

    store: Store
    indices: np.ndarray

    @classmethod
    def of(cls, store: Store | Mapping[str, Tensor]) -> Examples:
        """Return all examples of a store, or of tensors by name."""
        held = InMemory(store) if isinstance(store, Mapping) else store
        return cls(held, np.arange(len(held)))

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.indices)

    def select(self, positions: np.ndarray) -> Examples:
        """Return some of the examples, by their positions among these."""
        return Examples(self.store, self.indices[positions])

    def column(self, name: str) -> np.ndarray:
        """Return the examples' values of a column of numbers, such as `label`, shape (N,)."""
        values: np.ndarray = self.store.column(name)[self.indices]
        return values

    def in_order(self, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """Yield all examples once, in order; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            yield self._batch(slice(start, start + batch_size), device)

    def digest(self) -> str:
        """Return a digest of the examples' content, in order."""
        return content_digest("".join(map(digest, self.in_order(1024, torch.device("cpu")))))

    def shuffled(
        self, batch_size: int, device: torch.device, rng: np.random.Generator
    ) -> Iterator[Batch]:
        """Yield batches without end, reshuffled after each pass.

        The last batch of a pass may be smaller, so that every pass has each example once. A client with
        fewer examples than a batch yields all of them each time.

        A pass never ends in a batch of one, on which BatchNorm cannot be trained: it takes the last
        example of the batch before it (in passes of twos, both have this example).
        """
        if not len(self):
            raise ConfigError("there is no example to train on")
        lonely = len(self) > batch_size > 1 and len(self) % batch_size == 1
        while True:
            order = rng.permutation(len(self))
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                if lonely and len(rows) == 1:
                    rows = order[-2:]
                elif lonely and start + batch_size == len(order) - 1 and batch_size > 2:
                    rows = rows[:-1]
                yield self._batch(rows, device)

    def _batch(self, positions: np.ndarray | slice, device: torch.device) -> Batch:
        found = self.store.batch(self.indices[positions])
        return {name: tensor.to(device) for name, tensor in found.items()}


@dataclass(frozen=True)
class Inputs:
    """Inputs without labels, to predict on.

    Attributes
    ----------
    names : Sequence[str]
        What each is called: its file, and its row in a table.
    examples : Examples
    means : Sequence[Sequence[str | None]], optional
        What the outputs for each input stand for: the answers of its classes, if they differ between
        inputs, or its tokens, if each has a tag (None for an output without a token of its own).
    """

    names: Sequence[str]
    examples: Examples
    means: Sequence[Sequence[str | None]] | None = None


class Task(ABC):
    """Data, model, loss and scores of one experiment.

    Parameters
    ----------
    config : RunConfig
        The run's configuration, of which a task reads `task`, `model` and `run.seed`, and whether the
        server stacks adapters.

    Notes
    -----
    A task is built once per process and used often, so loading and partitioning belong in cached
    properties. Everything must depend on the configuration only, since server and clients each build
    a task.

    Raises
    ------
    ConfigError
        If a setting is given that the task does not read, or a model that it cannot use.
    """

    class Options(Section):
        """The task's own settings; each field is a key `task.NAME`."""

    kind: ClassVar[type[Tally]] = SingleLabel
    """What outputs and targets are, with the loss and the scores that follow (`task/scoring.py`)."""

    smooths: ClassVar[bool] = True
    """Whether every class is a choice in every example, as `train.label-smoothing` needs."""
    settings: ClassVar[frozenset[str]] = frozenset()
    """Fields of `TaskConfig` that this task reads, besides those that every task reads."""
    reads: ClassVar[str] = ""
    """What its models read, "image" or "text"; empty if it builds one model, whatever `model.name`."""
    never_augmented: ClassVar[str] = "its examples are no images"
    """Why `train.augment` is refused, unless the task has `augment`."""
    own_data = False
    """Whether `task.data` holds one node's own examples, instead of the run's data."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        section, defaults = config.task, TaskConfig()  # type: ignore[call-arg]
        self.options: Any = self._read_options(section)
        unread = set(TaskConfig.model_fields) - self.settings - COMMON
        for name in sorted(unread):
            if getattr(section, name) != getattr(defaults, name):
                read = ", ".join(map(_key, sorted(self.settings | COMMON)))
                raise ConfigError(
                    f"{_key(name)} = {getattr(section, name)!r} has no use for task.name = "
                    f"'{section.name}', which reads {read}"
                )
        fitting = [name for name, reads in FAMILIES.items() if reads == self.reads] or ["layerfed"]
        if config.model.family not in fitting:
            raise ConfigError(
                f"model.name = '{config.model.name}' does not fit task.name = '{section.name}', whose "
                f"models come from {', '.join(fitting)}"
            )
        if config.train.augment != "none" and type(self).augment is Task.augment:
            raise ConfigError(
                f"train.augment = '{config.train.augment}' has no use for task.name = "
                f"'{section.name}': {self.never_augmented}"
            )
        for name in (score.name for score in self.kind.scores):
            if name in TAKEN or name in METRICS:
                raise ConfigError(
                    f"task.name = '{section.name}': {self.kind.__name__} cannot call a score '{name}', "
                    "since the files of runs call something else so; choose another name"
                )
        names = [score.name for score in self.scores]
        if section.metric and section.metric not in names:
            raise ConfigError(
                f"task.metric = '{section.metric}' is not a score of task.name = '{section.name}': it "
                f"should be one of {', '.join(names)}{nearest(section.metric, names)}"
            )

    def _read_options(self, section: TaskConfig) -> Section:
        """Return the task's own settings.

        Raises
        ------
        ConfigError
            If one is unknown, given twice, or has a wrong value.
        """
        own = section_keys(self.Options, "task.")
        if taken := [key for key in own if key in section_keys(TaskConfig, "task.")]:
            raise ConfigError(
                f"task.name = '{section.name}': no setting of its own can be called {taken[0]}; that is "
                "a setting of every task"
            )
        given = {f"task.{key}": value for key, value in section.keys.items()}
        twice = {f"task.{key}": value for key, value in section.own.items()}
        for key, value in twice.items():
            if given.setdefault(key, value) != value:
                raise ConfigError(
                    f"{key} = {given[key]!r}, and task.options says {value!r}; give it once"
                )
        known = [*section_keys(TaskConfig, "task."), *own]
        for key in given:
            if key not in own:
                raise ConfigError(
                    f"unknown key '{key}'; task.name = '{section.name}' has settings of its own: "
                    f"{', '.join(own) or 'none'}{nearest_key(key, known)}"
                )
        try:
            return self.Options(**{key.removeprefix("task."): v for key, v in given.items()})
        except ValidationError as error:
            raise ConfigError(explain(error, own, "task.")) from None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the outputs; () if they have none."""
        return ()

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups; examples have the position of theirs as `group`. () if there are none."""
        return ()

    @property
    def scores(self) -> tuple[Score, ...]:
        """All scores of the task, the loss last."""
        return (*self.kind.scores, LOSS)

    @property
    def metric(self) -> Score:
        """The main score: `task.metric`, or the first one."""
        asked = self.config.task.metric or self.scores[0].name
        return next(score for score in self.scores if score.name == asked)

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Return the pretrained model with a new head, drawn from `Stream.HEAD`."""

    def skeleton(self) -> nn.Module:
        """Return a model of the same layers without loading weights, as `layerfed layers` needs it."""
        return self.build_model()

    def preprocessing(self) -> dict[str, Any]:
        """Return how raw inputs become the model's, for a run folder's `classes.json`."""
        return {}

    def keep(self, folder: Path) -> None:
        """Write to a run folder what makes raw inputs into the model's and its outputs into names.

        This is `classes.json`; a subclass may add files, such as a tokenizer's.
        """
        from layerfed.runs.files import write_json  # a node needs no run folder

        content = {"classes": list(self.classes), "preprocessing": self.preprocessing()}
        write_json(folder / "classes.json", content)

    def recall(self, folder: Path) -> None:
        """Take from a run folder what `keep` wrote there, so that the model needs no data.

        Raises
        ------
        ConfigError
            If the task has other classes now.
        """
        from layerfed.runs.files import read_json

        theirs = read_json(folder / "classes.json")["classes"]
        if theirs != list(self.classes):
            raise ConfigError(
                f"the run {folder} had the classes {', '.join(theirs)}, but task.name = "
                f"'{self.config.task.name}' now has {', '.join(self.classes) or 'none'}"
            )

    def read(self, file: Path) -> Inputs:
        """Return the inputs in a file, to predict on.

        Raises
        ------
        ConfigError
            If the task reads no files, or cannot read this one.
        """
        name = self.config.task.name
        raise ConfigError(
            f"task.name = '{name}' reads no files; give it a method `read` that returns a file's Inputs"
        )

    def summary(self) -> str:
        """Return what the task chose for its model's inputs, in one line; empty if it has no choice."""
        return ""

    @abstractmethod
    def partition(self, partition_id: int) -> Examples:
        """Return all examples of one client."""

    @abstractmethod
    def test_examples(self) -> Examples:
        """Return the server's test set."""

    @abstractmethod
    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's outputs, in the form that the task's kind reads."""

    def targets(self, batch: Batch) -> Tensor:
        """Return what the outputs should be, in the form that the task's kind reads."""
        return batch["label"]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return a batch's mean loss to train on; by default that of the task's kind.

        The loss in every file is that of the kind, also if this method is overridden.
        """
        return self.kind.loss(self.logits(model, batch), self.targets(batch))

    def answers(self, model: nn.Module, batch: Batch) -> tuple[Sequence[object], Sequence[object]]:
        """Return generated answers and the right ones, if the kind is `Generation`.

        The right ones of inputs without any, which are only predicted on, may be anything.
        """
        raise ConfigError("its kind is Generation, so it needs a method `answers`")

    def groups_of(self, examples: Examples) -> dict[str, np.ndarray]:
        """Return the positions of each group's examples; empty for examples without groups."""
        if not self.groups:
            return {}
        numbers = examples.column("group")
        found = {name: np.flatnonzero(numbers == i) for i, name in enumerate(self.groups)}
        others = np.flatnonzero((numbers < 0) | (numbers >= len(self.groups)))
        # A group of the task's own may have that name.
        found[OTHER] = np.union1d(found.get(OTHER, others[:0]), others)
        return {name: rows for name, rows in found.items() if len(rows)}

    def augment(self, batch: Batch) -> Batch:
        """Return a training batch with the random changes of `train.augment`.

        It draws from torch's global generator, which the caller seeds for each batch. The batch is in
        the main memory. Batches of probes and evaluations are never changed.
        """
        return batch

    def example(self) -> Batch | None:
        """Return a made-up batch, on which the model shows how it uses its layers.

        It must be the same on the server and on every client. Without one, the model is split by the
        order in which its modules are registered.
        """
        return None

    def largest_batch(self, size: int) -> Batch | None:
        """Return a batch without values, on torch's `meta` device, as large as one can be."""
        example = self.example()
        if example is None:
            return None
        if type(self).targets is Task.targets and self.kind is SingleLabel:
            row: Batch = {"label": torch.zeros(1, dtype=torch.long)}
        else:  # what the loss reads is in the data only
            row = next(self.test_examples().in_order(1, torch.device("cpu")))
        return {
            name: torch.empty((size, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")
            for name, tensor in {**row, **example}.items()
        }

    def _forward(self) -> Forward | None:
        """Return a function that runs a model on the example, if there is one."""
        example = self.example()
        if not example:
            return None

        def forward(model: nn.Module) -> Tensor:
            device = next(model.parameters()).device
            return self.logits(model, {k: v.to(device) for k, v in example.items()})

        return forward

    def adapted(self, model: nn.Module) -> nn.Module:
        """Return the model as it is trained: with adapters in its blocks if `model.tuning` says so.

        Raises
        ------
        ConfigError
            If the model cannot be split, or a block has nothing to adapt.
        """
        if self.config.model.tuning == "lora":
            layers = self.layers(model)
            seed, folded = self.config.run.seed, self.config.server.aggregation == "stack"
            insert_adapters(model, layers, self.config.model, seed, self._forward(), folded=folded)
        return model

    def layers(self, model: nn.Module) -> LayerMap:
        """Split the model into layers, by the configuration's patterns or, without any, by search.

        Raises
        ------
        ConfigError
            If the model cannot be split that way.
        """
        if (known := adapted_layers(model)) is not None:
            return known
        section = self.config.model
        try:
            found = LayerMap.from_model(
                model,
                blocks=section.blocks or None,
                head=section.head,
                embeddings=section.embeddings,
                units=section.units,
                forward=self._forward(),
            ).keeping(section.personal)
            return found.with_frozen_statistics(model) if section.frozen_statistics else found
        except LayerMapError as error:
            raise ConfigError(str(error)) from None

    def own_examples(self) -> Examples:
        """Return all examples of a node that has data of its own.

        Raises
        ------
        ConfigError
            If the task does not support a node's own data, or if the data do not fit the run.
        """
        raise ConfigError(
            f"own-data = '{self.config.task.data}': task.name = '{self.config.task.name}' takes no data "
            "of a node's own; leave own-data out, or choose a task that does, such as custom"
        )

    def fingerprint(self) -> str:
        """Return the identity of the data: a digest of the test set's content."""
        return self.test_examples().digest()

    def client_examples(self, partition_id: int) -> tuple[Examples, Examples]:
        """Return one client's training examples and its held-out share (`task.local-test`)."""
        examples = self.own_examples() if self.own_data else self.partition(partition_id)
        share = self.config.task.local_test
        held_out = max(1, int(len(examples) * share)) if share else 0
        if len(examples) <= held_out:
            held = (
                f", of which task.local-test = {share:g} leaves none to train on" if share else ""
            )
            raise ConfigError(
                f"the client of partition {partition_id} has {len(examples)} examples{held}; give it "
                "more, or choose fewer clients" + ", or task.local-test=0" * bool(share)
            )
        rng = generator(self.config.run.seed, Stream.LOCAL_TEST, partition_id)
        order = rng.permutation(len(examples))
        if not held_out:
            return examples, examples.select(order[:0])
        return examples.select(np.sort(order[held_out:])), examples.select(order[:held_out])


def _key(field: str) -> str:
    """Return the dotted key of a field of `TaskConfig`."""
    return f"task.{field.replace('_', '-')}"
