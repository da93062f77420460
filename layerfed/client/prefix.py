"""The frozen prefix, computed once: the output of the blocks below the lowest one in training is kept.

Between two changes of these blocks, an example always gives the same output there. It is kept in half
precision, in temporary files of the process, by the digests of the blocks and of the example. A step
then begins at the first block that is trained.

How a model is cut is found out on its first batch. The modules of the prefix are skipped: all return
NaN, but for the last of them, which returns what was kept. So whatever reaches the rest of the network
by another way makes the result NaN. Masks and comparisons hide NaN, so all return ones as well. If
either result differs from that of the whole model, nothing is kept.
"""

from __future__ import annotations

import tempfile
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from hashlib import blake2b
from logging import WARNING
from math import prod
from typing import Any, TypeVar

import torch
from flwr.common.logger import log
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from layerfed.client.devices import autocast
from layerfed.client.flops import TotalFlops, counted
from layerfed.client.resident import ResidentModel
from layerfed.client.skipping import with_forward
from layerfed.exchange.store import user_cache
from layerfed.models.layers import LayerMap
from layerfed.task.base import Batch

__all__ = ["Kept", "Prefix", "PrefixCache"]

T = TypeVar("T")
Forward = Callable[[nn.Module, Batch], T]

# The name of the kept outputs in a batch, so that they are cut into parts with it.
NAME = "prefix"
# The type in which outputs are kept.
TYPE = torch.float16
# Bytes that a file of outputs is made of at once.
CHUNK = 2**25
# Rows on which a cut model is compared with the whole one, and how far they may differ.
COMPARED, TOLERANCE = 3, {"float32": 1e-3, "bfloat16": 3e-2}

# The least share of a forward pass that is worth keeping.
LEAST = 0.1
# What a skipped module may return: a number would stay that of the first batch.
PLAIN = (Tensor, type(None))


class Kept:
    """Rows of numbers of `TYPE`, in temporary files that are bounded together.

    Rows belong to groups of a version and a shape. If the room ends, groups of other versions go,
    the least recently used first; a version that fills it alone keeps the rows that it has.

    Parameters
    ----------
    limit : float
        Bytes.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._groups: dict[tuple[str, Hashable], _Group] = {}

    @property
    def nbytes(self) -> int:
        """The bytes of all files."""
        return sum(group.nbytes for group in self._groups.values())

    def find(self, name: tuple[str, Hashable], keys: Sequence[bytes]) -> dict[int, Tensor]:
        """Return the rows that are kept, by their position among the keys."""
        group = self._groups.pop(name, None)
        if group is None:
            return {}
        self._groups[name] = group  # the most recently used is last
        places = ((i, group.places.get(key)) for i, key in enumerate(keys))
        return {i: group.row(place) for i, place in places if place is not None}

    def add(self, name: tuple[str, Hashable], keys: Sequence[bytes], rows: Tensor) -> None:
        """Keep rows, shape (N, W), as far as there is room."""
        group = self._groups.setdefault(name, _Group(rows.shape[1], self.limit))
        for key, row in zip(keys, rows.cpu(), strict=True):
            if len(group.places) == group.room and not self._grown(name[0], group, len(rows)):
                return
            group.row(group.places.setdefault(key, len(group.places))).copy_(row)

    def _grown(self, version: str, group: _Group, least: int) -> bool:
        others = (name for name in list(self._groups) if name[0] != version)
        rows = min(group.most, max(group.room, least))
        while self.nbytes + rows * group.row_bytes > self.limit:
            if (oldest := next(others, None)) is None:
                return False
            del self._groups[oldest]
        try:
            group.grow(rows)
        except OSError as error:
            log(WARNING, "no more outputs of frozen blocks are kept: %s", error)
            self.limit = self.nbytes
            return False
        return True


class _Group:
    """Rows of one width, in files that were deleted and live as long as they are mapped.

    Each file has as many rows as all before it, so that a group of few rows takes little room.
    """

    def __init__(self, width: int, limit: float) -> None:
        self.width, self.row_bytes = width, TYPE.itemsize * width
        self.most = max(1, int(min(CHUNK, limit / 8) // self.row_bytes))
        self.places: dict[bytes, int] = {}
        self.room = 0
        self._files: list[Tensor] = []
        self._starts: list[int] = []

    @property
    def nbytes(self) -> int:
        return self.room * self.row_bytes

    def row(self, place: int) -> Tensor:
        file = bisect_right(self._starts, place) - 1
        return self._files[file][place - self._starts[file]]

    def grow(self, rows: int) -> None:
        folder = user_cache()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            # Written, since a full disk kills a process that writes to a mapped file without blocks.
            file.write(bytes(rows * self.row_bytes))
            file.flush()
            mapped = torch.from_file(file.name, shared=True, size=rows * self.width, dtype=TYPE)
        self._files.append(mapped.view(rows, self.width))
        self._starts.append(self.room)
        self.room += rows


@dataclass(frozen=True)
class _Output:
    """The form of a module's output, in which the first dimension is the batch's where it was."""

    tree: TreeSpec
    parts: tuple[tuple[tuple[int, ...], torch.dtype] | object, ...]

    @classmethod
    def of(cls, output: object, rows: int) -> _Output:
        leaves, tree = tree_flatten(output)
        return cls(tree, tuple(_Form.of(x, rows) if isinstance(x, Tensor) else x for x in leaves))

    @property
    def forms(self) -> list[_Form]:
        return [part for part in self.parts if isinstance(part, _Form)]

    def made(self, make: Callable[[_Form], Tensor]) -> Any:
        leaves = [make(part) if isinstance(part, _Form) else part for part in self.parts]
        return tree_unflatten(leaves, self.tree)

    def nothing(self, rows: int, device: torch.device, *, ones: bool = False) -> Any:
        """Return such an output of ones, or of NaN (zeros where that does not exist), without memory."""

        def empty(form: _Form) -> Tensor:
            value = 1.0 if ones else torch.nan if form.dtype.is_floating_point else 0
            shape = (rows, *form.shape[1:]) if form.batched else form.shape
            return torch.full((), value, dtype=form.dtype, device=device).expand(shape)

        return self.made(empty)

    def rebuilt(self, values: Tensor) -> Any:
        """Return the output that has these values, shape (B, W)."""
        parts = iter(torch.split(values, [prod(f.shape[1:]) for f in self.forms], dim=1))
        return self.made(lambda f: next(parts).reshape(-1, *f.shape[1:]).to(f.dtype))


@dataclass(frozen=True)
class _Form:
    shape: tuple[int, ...]
    dtype: torch.dtype
    batched: bool

    @classmethod
    def of(cls, tensor: Tensor, rows: int) -> _Form:
        shape = tuple(tensor.shape)
        return cls(shape, tensor.dtype, bool(shape) and shape[0] == rows)


def _flat(output: object) -> Tensor:
    """Return the tensors of an output as one, shape (B, W)."""
    parts = [leaf.flatten(1) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return torch.cat([part.float() for part in parts], dim=1)


class _Reached(Exception):
    """The output of the prefix, which ends a forward pass."""


@dataclass(frozen=True)
class Split:
    """The cut of a model on batches of one shape.

    Attributes
    ----------
    last : nn.Module
        The module that returns what is kept.
    output : _Output
        Its output's form.
    skipped : Mapping[nn.Module, _Output]
        The modules before it, which do nothing.
    flops : float
        The FLOPs that are saved for one example.
    """

    last: nn.Module
    output: _Output
    skipped: Mapping[nn.Module, _Output]
    flops: float = 0.0

    @contextmanager
    def resumed(self, values: Tensor, *, ones: bool = False) -> Iterator[None]:
        """Begin forward passes at the outputs of the prefix, shape (B, W), within the context.

        Skipped modules return NaN, or `ones`, which reach nothing.
        """
        with ExitStack() as stack:
            for module, output in self.skipped.items():
                nothing = output.nothing(len(values), values.device, ones=ones)
                stack.enter_context(_returning(module, nothing))
            stack.enter_context(_returning(self.last, self.output.rebuilt(values)))
            yield

    def compute(self, run: Callable[[], object]) -> Tensor:
        """Return the outputs of the prefix, shape (B, W), by a forward pass that ends there."""

        def stop(_module: nn.Module, _inputs: object, output: object) -> None:
            raise _Reached(output)

        handle = self.last.register_forward_hook(stop)
        try:
            run()
        except _Reached as reached:
            return _flat(reached.args[0])
        finally:
            handle.remove()
        raise RuntimeError("a forward pass has not used the block at which it is cut")


def _returning(module: nn.Module, output: object) -> AbstractContextManager[None]:
    """Let a module return a value, whatever it gets, within the context."""
    return with_forward(module, lambda *_args, **_named: output)


@contextmanager
def _as_frozen(model: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """Run without gradients and in evaluation mode, which is put back afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), autocast(device, precision):
            yield
    finally:
        for module in training:
            module.training = True


@dataclass
class PrefixCache:
    """The outputs of frozen prefixes that a process keeps, for all its clients and evaluations.

    Parameters
    ----------
    resident : ResidentModel
    limit : float
        Bytes.

    Attributes
    ----------
    splits : dict[Hashable, Split]
        How the model is cut, by block and the shape of an example.
    refused : dict[int, str]
        The blocks below which the model cannot be cut, and why.
    """

    resident: ResidentModel
    limit: float
    splits: dict[Hashable, Split] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kept = Kept(self.limit)

    def below(self, low: int, precision: str = "float32") -> Prefix | None:
        """Return the prefix below a block, if it has blocks and is as a version of the model has it.

        Parameters
        ----------
        low : int
            The index of the block, or L for the head.
        precision : {"float32", "bfloat16"}
        """
        if low in self.refused:
            return None
        layers = self.resident.layers.layers[: low + 1]
        version = self.resident.version(layer.name for layer in layers)
        return None if version is None else Prefix(self, low, precision, version)

    def evaluating(self, logits: Forward[T]) -> Forward[T]:
        """Return a function that scores with the prefix below the lowest block that ever changed."""
        prefix = self.below(self.resident.lowest_changed)
        if prefix is None:
            return logits
        resumed = prefix.resuming(logits)
        return lambda model, batch: resumed(model, prefix.joined(model, batch, logits))

    def refuse(self, low: int, why: str) -> None:
        """Keep nothing below a block from now on, and say each reason once."""
        if why not in self.refused.values():
            log(WARNING, "train.prefix-cache keeps nothing below block %d: %s", low, why)
        self.refused[low] = why


@dataclass
class Prefix:
    """The frozen blocks below one, at one version.

    Attributes
    ----------
    flops : float
        The FLOPs of computing outputs, and of comparing the cut model with the whole one.
    saved : float
        The FLOPs that outputs that were kept would have taken.
    found : int
        The number of examples whose outputs were kept.
    """

    cache: PrefixCache
    low: int
    precision: str
    version: str
    flops: float = 0.0
    saved: float = 0.0
    found: int = 0

    def joined(self, model: nn.Module, batch: Batch, forward: Forward[Any]) -> Batch:
        """Return a batch with the outputs of the prefix, or as it is if the model cannot be cut.

        Parameters
        ----------
        model : nn.Module
        batch : Batch
        forward : Callable
            A forward pass of the model on a batch, such as the loss.
        """
        split = self._split(model, batch, forward)
        if split is None:
            return batch
        name, keys = (self.version, self._shape(batch)), _keys(batch)
        known = self.cache.kept.find(name, keys)
        missing = [i for i in range(len(keys)) if i not in known]
        device = next(iter(batch.values())).device
        width = sum(prod(form.shape[1:]) for form in split.output.forms)
        values = torch.empty(len(keys), width, dtype=TYPE, device=device)
        if known:
            values[list(known)] = torch.stack(list(known.values())).to(device)
        if missing:
            part: Batch = {n: tensor[missing] for n, tensor in batch.items()}
            # Where the work begins is part of its cost.
            begins = min(self.cache.resident.lowest_changed, self.low)
            part, forward = self._begun(model, part, forward)
            with _as_frozen(model, device, self.precision):
                run = partial(split.compute, partial(forward, model, part))
                kind = ("prefix", begins, self.low, self.precision)
                computed, flops = counted(model, kind, part, run)
            self.flops += flops
            rounded = computed.to(TYPE)
            if not rounded.isfinite().all():
                self.cache.refuse(self.low, "its inputs are too large for half precision")
                return batch
            values[missing] = rounded
            self.cache.kept.add(name, [keys[i] for i in missing], rounded)
        self.found += len(known)
        self.saved += len(known) * split.flops
        return {**batch, NAME: values}

    def _begun(
        self, model: nn.Module, batch: Batch, forward: Forward[T]
    ) -> tuple[Batch, Forward[T]]:
        """Begin where nothing ever changed, if that is lower, since it stays valid over rounds."""
        low = self.cache.resident.lowest_changed
        lower = self.cache.below(low, self.precision) if low < self.low else None
        if lower is None:
            return batch, forward
        begun = lower.joined(model, batch, forward)
        self.flops += lower.flops
        self.saved += lower.saved
        return begun, lower.resuming(forward)

    def resuming(self, forward: Forward[T]) -> Forward[T]:
        """Return a forward pass that begins at the outputs of the prefix, if a batch has them."""

        @wraps(forward)
        def run(model: nn.Module, batch: Batch) -> T:
            values = batch.get(NAME)
            rest = {name: tensor for name, tensor in batch.items() if name != NAME}
            if values is None:
                return forward(model, batch)
            with self.cache.splits[self._key(rest)].resumed(values):
                return forward(model, rest)

        return run

    def _shape(self, batch: Batch) -> Hashable:
        return self.precision, tuple((n, tuple(t.shape[1:]), t.dtype) for n, t in batch.items())

    def _key(self, batch: Batch) -> Hashable:
        return self.low, self._shape(batch)

    def _split(self, model: nn.Module, batch: Batch, forward: Forward[Any]) -> Split | None:
        key, cache = self._key(batch), self.cache
        if self.low not in cache.refused and key not in cache.splits:
            device = next(iter(batch.values())).device
            with _as_frozen(model, device, self.precision), TotalFlops() as flops:
                layers = cache.resident.layers
                found = _cut(model, layers, self.low, batch, forward, TOLERANCE[self.precision])
            self.flops += flops.total
            if isinstance(found, str):
                cache.refuse(self.low, found)
            else:
                cache.splits[key] = found
        return None if self.low in cache.refused else cache.splits[key]


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _keys(batch: Batch) -> list[bytes]:
    """Return the digest of each example's content.

    Its place in the data would do for the stores of this package, but a store of a task's own may
    change examples at random.
    """
    columns = [
        batch[name].detach().cpu().reshape(_rows(batch), -1).contiguous().view(torch.uint8).numpy()
        for name in sorted(batch)
    ]
    found = []
    for row in range(_rows(batch)):
        content = blake2b(digest_size=16)
        for column in columns:
            content.update(column[row].data)
        found.append(content.digest())
    return found


def _cut(
    model: nn.Module,
    layers: LayerMap,
    low: int,
    batch: Batch,
    forward: Forward[Any],
    tolerance: float,
) -> Split | str:
    """Find out how a model is cut below a block, or why it cannot be, such as another result."""
    modules = dict(model.named_modules())
    if _rows(batch) == 1:
        batch = {name: torch.cat([tensor, tensor]) for name, tensor in batch.items()}
    rows = _rows(batch)
    parts = [[modules[n] for n in x.modules] for x in layers.layers[: low + 1]]
    calls: list[tuple[nn.Module, object]] = []
    with ExitStack() as hooks:
        for module in (m for part in parts for m in part):

            def note(module: nn.Module, _inputs: object, output: object) -> None:
                calls.append((module, output))

            hooks.callback(module.register_forward_hook(note).remove)
        forward(model, batch)
    called = [module for module, _ in calls]
    ends = [i for i, module in enumerate(called) if module in parts[-1]]
    if not ends or called.count(called[ends[-1]]) != 1:
        return "the block before is used more than once, or not by itself"
    end = ends[-1]
    output = _Output.of(calls[end][1], rows)
    if not output.forms or not all(f.batched and f.dtype.is_floating_point for f in output.forms):
        return "the block before returns more than numbers for each example"
    values = _flat(calls[end][1])
    before = {
        module: _Output.of(made, rows)
        for module, made in calls[:end]
        if called.count(module) == 1 and all(isinstance(x, PLAIN) for x in tree_leaves(made))
    }
    # Fewer rows in another order: a first dimension that is not the batch's shows itself.
    some = torch.arange(min(rows - 1, COMPARED), device=values.device).flip(0)
    part = {name: tensor[some] for name, tensor in batch.items()}
    heads = [modules[name] for name in layers.head.modules]
    with TotalFlops() as full:
        whole = _seen(heads, lambda: forward(model, part))
    # A table of positions, for example, is an embedding that all blocks read.
    for kept in (set[nn.Module](), set(parts[0])):
        skipped = {module: made for module, made in before.items() if module not in kept}
        split = Split(called[end], output, skipped)
        try:
            with TotalFlops() as used, split.resumed(values[some]):
                found = _seen(heads, lambda: forward(model, part))
            with split.resumed(values[some], ones=True):
                again = _seen(heads, lambda: forward(model, part))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            continue
        if _close(found, whole, tolerance) and _close(again, whole, tolerance):
            saved = full.total - used.total
            if saved < LEAST * full.total:
                return "it would save too little"
            return replace(split, flops=saved / len(some))
    return "more than the output of the block before reaches the rest"


def _seen(modules: Sequence[nn.Module], run: Callable[[], object]) -> list[Tensor]:
    """Return the tensors that some modules return in a forward pass, and its result's."""
    found: list[object] = []
    with ExitStack() as hooks:
        for module in modules:
            handle = module.register_forward_hook(lambda _m, _inputs, output: found.append(output))
            hooks.callback(handle.remove)
        found.append(run())
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def _close(found: Sequence[Tensor], whole: Sequence[Tensor], tolerance: float) -> bool:
    return len(found) == len(whole) and all(
        a.shape == b.shape
        # Written so that NaN is far.
        and bool((a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max())
        for a, b in zip(found, whole, strict=True)
    )
