"""One forward pass of a model: what it uses, in which order, and what depends on what.

The pass is recorded by hooks on the modules and by autograd's graph of the result, with every parameter
requiring a gradient. So "depends on" means exactly "backward reaches". The pass changes nothing in the
model: it runs in evaluation mode, and flags and modes are restored. On torch's `meta` device it costs no
memory and no arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Forward", "OnesOnMeta", "Reach", "Trace", "Uses", "trace"]

Forward = Callable[[nn.Module], object]

# Operations that change the shape or type of a weight before it is used.
RESHAPING = ("TBackward", "ToCopy", "View", "Permute", "Transpose", "Unsqueeze", "Expand", "Clone")


@dataclass(frozen=True)
class Call:
    """One call of a module: the graph's nodes and the first shape of what it got and of what it gave.

    `alike` says whether it gave one tensor of the shape and type of the first one that it got.
    """

    given: tuple[Node, ...]
    made: tuple[Node, ...]
    shape_in: tuple[int, ...]
    shape_out: tuple[int, ...]
    alike: bool


@dataclass(frozen=True)
class Reach:
    """What backward reaches from some outputs, without passing through the outputs of other blocks.

    Attributes
    ----------
    tensors : frozenset[str]
        Parameters, by their first names.
    blocks : frozenset[int]
        Blocks whose outputs are met.
    """

    tensors: frozenset[str]
    blocks: frozenset[int]


@dataclass(frozen=True)
class Uses:
    """How the blocks of a model use its tensors.

    Attributes
    ----------
    reach : Sequence[Reach]
        What backward reaches from each block, and last from the model's result.
    once : frozenset[str]
        Parameters that a single operation uses together with the output of a block.
    handed_on : frozenset[str]
        Parameters from which alone a block computes a value that it returns, such as a table of
        relative positions that all later blocks read.
    """

    reach: Sequence[Reach]
    once: frozenset[str]
    handed_on: frozenset[str]


@dataclass(frozen=True)
class Trace:
    """The record of one forward pass.

    Attributes
    ----------
    order : Mapping[str, int]
        When each module was first entered. A module that is not called itself, such as a list, has the
        time of the first call inside it. Modules that were not used are missing.
    calls : Mapping[str, Sequence[Call]]
        Calls of each module, by the first of its names.
    result : tuple[Node, ...]
        The graph's nodes of the result.
    names : Mapping[Tensor, str]
        First names of the parameters.
    """

    order: Mapping[str, int]
    calls: Mapping[str, Sequence[Call]]
    result: tuple[Node, ...]
    names: Mapping[Tensor, str]

    def shapes(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of a module's input and output, or of the first and last call inside it."""
        inside = (
            [name] if name in self.calls else [n for n in self.calls if n.startswith(name + ".")]
        )
        first, *_, last = [*sorted(inside, key=self.order.__getitem__)] * 2
        return self.calls[first][0].shape_in, self.calls[last][-1].shape_out

    def uses(self, blocks: Sequence[str]) -> Uses:
        """Return how blocks, in this order, use the model's tensors."""
        made: dict[Node, int] = {}  # a tensor that later blocks pass on belongs to the first
        weights: set[Node] = set()  # what blocks return although it depends on no input
        for index, name in enumerate(blocks):
            for call in self.calls.get(name, ()):
                for node in call.made:
                    if call.given and set(_upwards([node])).isdisjoint([*call.given, *made]):
                        weights.add(node)
                    elif node not in weights:
                        made.setdefault(node, index)
        roots = [[node for node, at in made.items() if at == i] for i in range(len(blocks))]
        reach = [self._reach(r, made, i) for i, r in enumerate([*roots, list(self.result)])]
        handed_on = frozenset(self._tensors_of(_upwards(weights)))
        return Uses(reach, self._used_once(made), handed_on)

    def _tensors_of(self, nodes: Iterable[Node]) -> set[str]:
        """Return the parameters among the nodes of a graph."""
        leaves = (getattr(node, "variable", None) for node in nodes)
        return {self.names[leaf] for leaf in leaves if leaf is not None and leaf in self.names}

    def _reach(self, roots: Sequence[Node], made: Mapping[Node, int], own: int) -> Reach:
        tensors: set[str] = set()
        met: set[int] = set()
        seen, todo = set(roots), list(roots)
        while todo:
            node = todo.pop()
            other = made.get(node, own)
            if other != own:
                met.add(other)
                continue
            tensors |= self._tensors_of([node])
            fresh = set(_parts(node)) - seen
            seen |= fresh
            todo += fresh
        return Reach(frozenset(tensors), frozenset(met))

    def _used_once(self, made: Mapping[Node, int]) -> frozenset[str]:
        fed: set[Node] = set()  # the nodes that depend on a block's output
        for node in _upwards(self.result):
            if node in made or any(part in fed for part in _parts(node)):
                fed.add(node)
        users: dict[str, set[Node]] = {}
        for node in fed:
            todo = [part for part in _parts(node) if part not in fed]
            seen = set(todo)
            while todo:
                part = todo.pop()
                for name in self._tensors_of([part]):
                    users.setdefault(name, set()).add(node)
                fresh = set(_parts(part)) - seen
                seen |= fresh
                todo += fresh
        return frozenset(name for name, nodes in users.items() if len(nodes) == 1)

    def can_be_skipped(self, name: str) -> bool:
        """Return whether the network runs without a module: it adds to its input, and is called once."""
        calls = self.calls.get(name, ())
        if len(calls) != 1 or not calls[0].alike:
            return False
        # The input that goes on is the first one.
        given = calls[0].given
        return any(
            node not in given and _is_skip(node, given, given[0])
            for node in _upwards(calls[0].made, given)
        )

    def is_residual(self, name: str) -> bool:
        """Return whether a module adds a value to another that is computed from it."""
        inside = (
            [name] if name in self.calls else [n for n in self.calls if n.startswith(name + ".")]
        )
        return any(
            node not in call.given and _is_skip(node, call.given)
            for module in inside
            for call in self.calls[module]
            for node in _upwards(call.made, call.given)
        )


def trace(model: nn.Module, forward: Forward) -> Trace:
    """Record one forward pass.

    Parameters
    ----------
    model : nn.Module
    forward : Callable[[nn.Module], object]
        Runs the model on some input and returns its result, such as class scores.
    """
    order: dict[str, int] = {}
    calls: dict[str, list[Call]] = {}

    def entered(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            for prefix in _prefixes(name):
                order.setdefault(prefix, len(order))

        return hook

    def left(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: object, kwargs: object, output: object) -> None:
            given, made = list(_tensors((args, kwargs))), list(_tensors(output))
            shapes = [tuple(tensors[0].shape) if tensors else () for tensors in (given, made)]
            alike = isinstance(output, Tensor) and any(
                (output.shape, output.dtype, True)
                == (first.shape, first.dtype, first.requires_grad)
                for first in given[:1]
            )
            calls.setdefault(name, []).append(
                Call(_nodes(given), _nodes(made), shapes[0], shapes[1], alike)
            )

        return hook

    with ExitStack() as hooks, _all_require_gradients(model):
        if any(parameter.is_meta for parameter in model.parameters()):
            hooks.enter_context(torch.device("meta"))
            hooks.enter_context(OnesOnMeta())  # type: ignore[no-untyped-call]
        for name, module in model.named_modules():
            if name:
                hooks.callback(module.register_forward_pre_hook(entered(name)).remove)
                hook = module.register_forward_hook(left(name), with_kwargs=True)
                hooks.callback(hook.remove)
        result = _nodes(_tensors(forward(model)))
    return Trace(order, calls, result, {p: name for name, p in model.named_parameters()})


class OnesOnMeta(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which a `meta` tensor of one element has the value 1, or True.

    Models ask whether all of a mask is set, and `meta` tensors have no values.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, or answer for one that reads a value."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype, device="cpu").item()
        return func(*args, **(kwargs or {}))


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


@contextmanager
def _all_require_gradients(model: nn.Module) -> Iterator[None]:
    """Let all parameters require gradients, in evaluation mode, for the time of the context."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a module's input or output."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _tensors(vars(value))


def _nodes(tensors: Iterable[Tensor]) -> tuple[Node, ...]:
    return tuple(get_gradient_edge(tensor).node for tensor in tensors if tensor.requires_grad)


def _parts(node: Node) -> list[Node]:
    """Return the nodes that a node's operation read."""
    return [part for part, _ in node.next_functions if part is not None]


def _upwards(roots: Iterable[Node], stop: Container[Node] = ()) -> Iterator[Node]:
    """Yield the nodes of a graph, each after all that it depends on, and nothing below `stop`."""
    entered: set[Node] = set()
    todo = [(node, False) for node in roots]
    while todo:
        node, done = todo.pop()
        if done:
            yield node
        elif node not in entered:
            entered.add(node)
            todo.append((node, True))
            todo += [(part, False) for part in _parts(node) if node not in stop]


def _is_skip(node: Node, given: Container[Node], begin: Node | None = None) -> bool:
    """Return whether a node is a sum of a value and of another one that is computed from it.

    The first value may be changed by operations with weights on the way, as in a downsampling block.
    With `begin` it is to be this value.
    """
    parts = [part for part in _parts(node) if not _is_weight(part)]
    if len(parts) != 2 or not node.name().startswith("AddBackward"):
        return False
    return any(
        not set(_upwards([other], given)).isdisjoint(chain) and begin in (None, *chain)
        for part, other in (parts, reversed(parts))
        for chain in [list(_chain(part, given))]
    )


def _chain(node: Node, given: Container[Node]) -> Iterator[Node]:
    """Yield a node and those below it, as far as each depends on a single value besides weights."""
    while True:
        yield node
        parts = [part for part in _parts(node) if not _is_weight(part)]
        if node in given or len(parts) != 1:
            return
        node = parts[0]


def _is_weight(node: Node) -> bool:
    while not hasattr(node, "variable"):
        parts = _parts(node)
        if len(parts) != 1 or not node.name().startswith(RESHAPING):
            return False
        node = parts[0]
    return True
