"""Find the modules of a model that are its blocks, by search or by the user's patterns.

A stack is a sequence of modules that a forward pass goes through: the members of a list of composite
modules, or siblings of one class. The blocks are the stack with most of the parameters. If another stack
is as plausible, the user has to choose.

With a trace of a forward pass more is known. Stages give way to the residual blocks inside them, and
stacks that follow each other, such as those of an encoder and its decoder, are one stack.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NoReturn

from torch import nn
from torch.nn.parameter import is_lazy

from layerfed.config.section import words
from layerfed.models.trace import Trace

__all__ = [
    "LayerMapError",
    "are_convolutions",
    "find_blocks",
    "lies_in",
    "match_blocks",
    "match_tensors",
    "refuse_lazy",
    "refuse_left_over",
    "refuse_no_head",
    "some",
]

# A stack whose modules are smaller than the blocks by this factor is a stem or a neck, not a rival.
FAR_SMALLER = 0.1


class LayerMapError(ValueError):
    """Error for a model that cannot be split as asked; the message says why and what to do."""


def find_blocks(
    model: nn.Module, head: Sequence[str] = (), trace: Trace | None = None
) -> list[str]:
    """Return the names of the blocks, input first, without modules of the head.

    Parameters
    ----------
    model : nn.Module
    head : Sequence[str]
        Names of modules and tensors that are in no block.
    trace : Trace, optional
        A forward pass of the model.

    Raises
    ------
    LayerMapError
        If there is no stack, or more than one plausible stack. The message gives a pattern that works.
    """
    modules = dict(model.named_modules())
    found = _stacks(modules, "", head)
    if trace is not None:
        convolutions = _convolutions(modules, head, trace)
        found = _stacks_in_use(modules, found, convolutions, head, trace)
    # Sibling projections are a stack too, but only if no stack is made of composite modules.
    composite = [stack for stack in found if stack.composite]
    if trace is not None and convolutions and not composite:
        return convolutions
    found = composite or found
    if not found:
        raise LayerMapError(
            "no blocks were found: no list of modules, and no two modules of one class that follow "
            f"each other; name them with a pattern, as in model.blocks = '{_any_block(model, head)}'"
        )
    best = max(found, key=lambda stack: stack.elements)
    meant = [stack for stack in found if stack is best or stack.rivals(best)]
    if trace is not None:
        meant = [s for s in meant if s.kinds & best.kinds or not _is_stem(modules, s, best, trace)]
        together = sorted((p for stack in meant for p in stack.paths), key=trace.order.__getitem__)
        if len(meant) == 1 or _follow_each_other(together, trace):
            return together
    # Stages that hold stacks longer than their own; not layers that each hold the same experts.
    longer = [s for s in best.inner if s.composite and len(s.paths) > len(best.paths)]
    inner = longer if len(meant) == 1 and not best.alike else []
    if len(meant) > 1 or inner:
        shown = [f"'{_pattern(model, stack.paths)}'" for stack in (*meant, *inner)]
        raise LayerMapError(
            f"several stacks could be the blocks: {some(shown)}; choose one, as in model.blocks = "
            f"'{_pattern(model, meant[-1].paths)}'"
        )
    return list(best.paths)


def are_convolutions(model: nn.Module, blocks: Sequence[str]) -> bool:
    """Return whether the blocks are single convolutions, as in VGG and AlexNet."""
    return all(isinstance(model.get_submodule(name), _Convolution) for name in blocks)


def match_blocks(model: nn.Module, patterns: str, key: str = "model.blocks") -> list[str]:
    """Return the modules with parameters that match patterns, in the order of registration.

    Raises
    ------
    LayerMapError
        If a pattern matches nothing, or matches a module and another one inside it.
    """
    wanted = words(patterns)
    if not wanted:
        raise LayerMapError(
            f"{key} = '{patterns}' names nothing; give a pattern, as in 'encoder.layer.*', or "
            "leave it empty to have the blocks found"
        )
    rules = [_rule(pattern) for pattern in wanted]
    names = [name for name, module in model.named_modules() if name and _has_parameters(module)]
    for pattern, rule in zip(wanted, rules, strict=True):
        if not any(rule.fullmatch(name) for name in names):
            raise LayerMapError(
                f"{key} = '{pattern}' matches no module with parameters; {_near(pattern, names)}"
            )
    found = [name for name in names if any(rule.fullmatch(name) for rule in rules)]
    for name in found:
        nested = [other for other in found if other.startswith(name + ".")]
        if nested:
            raise LayerMapError(f"{key} = '{patterns}' matches {name} and {nested[0]} inside it")
    return found


def match_tensors(model: nn.Module, given: str | Sequence[str], key: str) -> list[str]:
    """Return the modules and tensors that match the user's names or patterns.

    Parameters
    ----------
    model : nn.Module
    given : str or Sequence[str]
        Names, or patterns with `*` for one part of a name; a text has commas between them.
    key : str
        The setting that they come from, such as `model.head`.

    Raises
    ------
    LayerMapError
        If a pattern matches nothing.
    """
    modules = model.named_modules(remove_duplicate=False)
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    names = [name for name, _ in (*modules, *parameters, *buffers) if name]
    found: list[str] = []
    for pattern in words(given) if isinstance(given, str) else given:
        matched = [name for name in names if _rule(pattern).fullmatch(name)]
        if not matched:
            raise LayerMapError(
                f"{key} = '{pattern}' is no module or tensor; {_near(pattern, names)}"
            )
        found += matched
    return found


def refuse_lazy(model: nn.Module) -> None:
    """Refuse a model with tensors that have no size yet.

    Raises
    ------
    LayerMapError
        If there are such tensors. The message names them.
    """
    lazy = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if is_lazy(t)]
    if lazy:
        raise LayerMapError(
            f"{some(lazy)} are not initialised yet, so they have no size; run one batch through the "
            "model before it is split into layers"
        )


def refuse_left_over(
    model: nn.Module, blocks: Sequence[str], head: Sequence[str], trace: Trace | None = None
) -> None:
    """Refuse blocks that are followed by others, which would silently become part of the head.

    They follow in order of use, or without a trace in order of registration.

    Raises
    ------
    LayerMapError
        If the rest of the blocks' own stack or a rival stack follows. The message names it.
    """
    modules = dict(model.named_modules())
    order = trace.order if trace else {name: index for index, name in enumerate(modules)}
    owners = [name for name, m in modules.items() if name in order and _has_parameters(m)]
    final = max(owners, key=order.__getitem__)
    chosen = _Stack.of({name: modules[name] for name in blocks})

    def touched(path: str) -> bool:
        return any(lies_in(path, [block]) or lies_in(block, [path]) for block in blocks)

    top = _stacks(modules, "", head)
    for stack in (*top, *(deep for outer in top for deep in outer.within())):
        rest = [p for p in stack.paths if order.get(p, -1) > order[blocks[-1]] and not touched(p)]
        if not stack.composite and rest[-1:] == [final]:
            # The last one of plain linear layers is a head.
            rest.pop()
        own = any(touched(path) for path in stack.paths)
        if rest and (own or (stack in top and stack.composite and stack.rivals(chosen))):
            pattern = _pattern(model, rest)
            raise LayerMapError(
                f"after the blocks ({blocks[0]} … {blocks[-1]}) follow {some(rest)}, which every client "
                "would always train; add them to the blocks, as in model.blocks = "
                f"'{_pattern(model, blocks)}, {pattern}', or, if that is meant, to the head, as in "
                f"model.head = '{pattern.replace('.*', '')}'"
            )


def refuse_no_head(blocks: Sequence[str]) -> NoReturn:
    """Refuse a model that ends with its blocks, and say what to do.

    Raises
    ------
    LayerMapError
        Always.
    """
    *rest, last = blocks
    example = f"model.blocks = '{', '.join(rest)}' with model.head = '{last}'"
    raise LayerMapError(
        f"nothing follows the blocks ({blocks[0]} … {last}), so there is no head to train; name the "
        "head, if it is registered before them (model.head)"
        + (f", or make it of the last of them, as in {example}" if rest else "")
    )


@dataclass(frozen=True)
class _Member:
    """A module that may belong to a stack.

    Attributes
    ----------
    path : str
    module : nn.Module
    group : str
        Empty for an attribute of its parent; "listed" for a member of a mixed list. For a member of a
        list of composite modules, the list's name, or "Sequential".
    kinds : frozenset[type]
        The classes in its list, or its own.
    """

    path: str
    module: nn.Module
    group: str
    kinds: frozenset[type]


@dataclass(frozen=True)
class _Stack:
    """A sequence of modules.

    Attributes
    ----------
    paths : tuple[str, ...]
    kinds : frozenset[type]
        Their classes.
    composite : bool
        Whether they are made of other modules.
    alike : bool
        Whether there are several, all with parameters of the same names and shapes.
    listed : bool
        Whether they stand in a list.
    elements : int
        Number of their parameter elements.
    inner : tuple[_Stack, ...]
        Stacks inside them.
    """

    paths: tuple[str, ...]
    kinds: frozenset[type]
    composite: bool
    alike: bool
    listed: bool
    elements: int
    inner: tuple[_Stack, ...] = field(repr=False)

    @classmethod
    def of(
        cls, members: Mapping[str, nn.Module], *, listed: bool = False, inner: Iterable[_Stack] = ()
    ) -> _Stack:
        """Make a stack of modules by their names."""
        modules = list(members.values())
        shapes = {tuple((n, p.shape) for n, p in m.named_parameters()) for m in modules}
        return cls(
            paths=tuple(members),
            kinds=frozenset(type(m) for m in modules),
            composite=_is_composite(modules[0]),
            alike=len(modules) > 1 and len(shapes) == 1,
            listed=listed,
            elements=sum(p.numel() for m in modules for p in m.parameters()),
            inner=tuple(inner),
        )

    def rivals(self, best: _Stack) -> bool:
        """Return whether this stack could be the blocks as well as `best`.

        It could if its modules are of the same class, or if it is long and its modules are not small.
        """
        mean, theirs = (s.elements / len(s.paths) for s in (self, best))
        return bool(self.kinds & best.kinds) or (
            len(self.paths) > 1 and mean >= FAR_SMALLER * theirs
        )

    def within(self) -> Iterator[_Stack]:
        """Yield the stacks inside, and those inside these."""
        for stack in self.inner:
            yield stack
            yield from stack.within()


def _stacks(modules: Mapping[str, nn.Module], parent: str, head: Sequence[str]) -> list[_Stack]:
    """Return the outermost stacks in a module, each with the stacks inside it."""
    found: list[_Stack] = []
    members = _members(modules, parent, head)
    for (_, group), run in groupby(members, key=lambda member: (member.kinds, member.group)):
        together = {member.path: member.module for member in run}
        inner = [stack for path in together for stack in _stacks(modules, path, head)]
        if _is_stack(group, list(together.values()), inner):
            found.append(_Stack.of(together, listed=group != "", inner=inner))
        else:
            found += inner
    return found


def _is_stack(group: str, modules: Sequence[nn.Module], inner: Sequence[_Stack]) -> bool:
    first = modules[0]
    if isinstance(first, nn.Embedding | nn.EmbeddingBag):
        return False
    if group == "":
        # An encoder and a decoder are no stack; the list in each of them is.
        holds_lists = isinstance(first, nn.ModuleList) or any(
            s.composite and s.listed for s in inner
        )
        return len(modules) > 1 and not holds_lists
    return len(modules) > 1 or group != "listed"


_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def _is_stem(modules: Mapping[str, nn.Module], stack: _Stack, best: _Stack, trace: Trace) -> bool:
    """Return whether a stack is a stem or neck beside the blocks `best`.

    It is one if it has no residual blocks and they have, or if it is convolutions and they are not.
    """

    def holds(part: _Stack, kind: Any) -> bool:
        return any(isinstance(m, kind) for path in part.paths for m in modules[path].modules())

    def residual(part: _Stack) -> bool:
        return any(trace.is_residual(path) for path in part.paths)

    convolved = holds(stack, _Convolution) and not holds(stack, nn.Linear)
    return (residual(best) and not residual(stack)) or (convolved and holds(best, nn.Linear))


def _convolutions(modules: Mapping[str, nn.Module], head: Sequence[str], trace: Trace) -> list[str]:
    """Return a model's convolutions in order of use, if one module directly holds most of them."""
    found: dict[str, list[str]] = {}
    for name, module in modules.items():
        if isinstance(module, _Convolution) and name in trace.calls and not lies_in(name, head):
            found.setdefault(name.rpartition(".")[0], []).append(name)
    longest = max(found.values(), key=len, default=[])
    most = len(longest) > max(1, sum(map(len, found.values())) / 2)
    return sorted(longest, key=trace.order.__getitem__) if most else []


def _used(modules: Mapping[str, nn.Module], paths: Sequence[str], trace: Trace) -> list[str]:
    """Return the modules that the pass used and that have parameters, in order of use."""
    used = [path for path in paths if path in trace.order and _has_parameters(modules[path])]
    return sorted(used, key=trace.order.__getitem__)


def _with_siblings(
    modules: Mapping[str, nn.Module], paths: Sequence[str], trace: Trace
) -> list[str]:
    """Return a stack's modules and the residual blocks of other classes in the same list."""
    parents = {path.rpartition(".")[0] for path in paths}
    others = [
        f"{parent}.{name}" if parent else name
        for parent in sorted(parents)
        if isinstance(modules[parent], nn.Sequential | nn.ModuleList)
        for name, child in modules[parent].named_children()
        if _is_composite(child)
    ]
    return [*paths, *(o for o in others if o not in paths and trace.is_residual(o))]


def _unfolded(
    modules: Mapping[str, nn.Module], paths: Sequence[str], head: Sequence[str], trace: Trace
) -> list[str]:
    """Return a stack's modules, or the blocks inside them if they are stages.

    Stages differ in the shapes of input and output. Layers of a transformer do not, so the parts of a
    layer are never taken for blocks.
    """
    if len({trace.shapes(path) for path in paths}) == 1:
        return list(paths)
    inside = [block for path in paths for block in _of_stage(modules, path, head, trace)]
    return [path for path in _used(modules, inside, trace) if not lies_in(path, head)]


def _stacks_in_use(
    modules: Mapping[str, nn.Module],
    found: Iterable[_Stack],
    convolutions: Sequence[str],
    head: Sequence[str],
    trace: Trace,
) -> list[_Stack]:
    """Return the stacks that the pass used, with blocks in place of stages.

    A stack of lists, one of which holds the model's convolutions directly, is left out.
    """
    used = [_used(modules, _with_siblings(modules, s.paths, trace), trace) for s in found]
    outermost = [
        paths
        for paths in used
        if paths
        and not any(paths != more and all(lies_in(p, more) for p in paths) for more in used)
        and not any(lies_in(name, paths) for name in convolutions if name not in paths)
    ]
    return [
        _Stack.of({path: modules[path] for path in _unfolded(modules, paths, head, trace)})
        for paths in outermost
    ]


def _of_stage(
    modules: Mapping[str, nn.Module], path: str, head: Sequence[str], trace: Trace
) -> Sequence[str]:
    """Return the blocks in a stage, or the stage itself if it holds no residual blocks."""
    if isinstance(modules[path], nn.Sequential | nn.ModuleList):
        return _flat(modules, [path], trace)
    inner = []
    for stack in _stacks(modules, path, head):
        names = _flat(modules, _with_siblings(modules, stack.paths, trace), trace)
        if stack.composite and any(trace.is_residual(name) for name in names):
            inner.append(_Stack.of({name: modules[name] for name in names}))
    largest = max(inner, key=lambda stack: stack.elements, default=None)
    return largest.paths if largest else [path]


def _flat(modules: Mapping[str, nn.Module], paths: Sequence[str], trace: Trace) -> list[str]:
    """Return modules with the composite members of a list in place of the list."""
    flat: list[str] = []
    for path in _used(modules, paths, trace):
        is_list = isinstance(modules[path], nn.Sequential | nn.ModuleList)
        members = [f"{path}.{name}" for name, _ in modules[path].named_children()] * is_list
        members = [member for member in members if _is_composite(modules[member])]
        flat += _flat(modules, members, trace) or [path]
    return flat


def _follow_each_other(blocks: Sequence[str], trace: Trace) -> bool:
    """Return whether each block reads the output of the one before it."""
    reach = trace.uses(blocks).reach
    return all(index - 1 in reach[index].blocks for index in range(1, len(blocks)))


def _members(
    modules: Mapping[str, nn.Module], parent: str, head: Sequence[str]
) -> Iterator[_Member]:
    """Yield a module's children that have parameters, and the members of its lists.

    Neighbouring Sequentials are one list, such as the stages of a ResNet. Activations between modules do
    not separate them. A module that is registered twice counts at its first place.
    """

    def children(path: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in modules[path].named_children():
            full = f"{path}.{name}" if path else name
            if full in modules and _has_parameters(child) and not lies_in(full, head):
                yield full, child

    group = "listed" if isinstance(modules[parent], nn.Sequential | nn.ModuleList) else ""
    for path, child in children(parent):
        if _is_list(child):
            kinds = frozenset(type(m) for m in child.children())
            origin = "Sequential" if isinstance(child, nn.Sequential) else path
            yield from (_Member(name, m, origin, kinds) for name, m in children(path))
        else:
            yield _Member(path, child, group, frozenset({type(child)}))


def _is_list(module: nn.Module) -> bool:
    """Return whether a module is a list of composite modules; those of a Sequential share a class."""
    children = list(module.children())
    if isinstance(module, nn.Sequential):
        fits = len({type(child) for child in children}) == 1
    else:
        fits = isinstance(module, nn.ModuleList)
    return fits and all(_is_composite(child) and _has_parameters(child) for child in children)


def _is_composite(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _any_block(model: nn.Module, head: Sequence[str]) -> str:
    """Return a module that can be a block and leaves modules for the head."""
    path, inside = "", model
    while True:
        children = {f"{path}{n}": c for n, c in inside.named_children() if _has_parameters(c)}
        if len(children) != 1:
            break
        path, inside = next((f"{name}.", child) for name, child in children.items())
    sizes = {
        name: sum(p.numel() for p in child.parameters())
        for name, child in children.items()
        if not lies_in(name, head)
    }
    before = list(sizes) if head else list(sizes)[:-1]
    return max(reversed(before), key=sizes.__getitem__, default="encoder.layer.*")


def _pattern(model: nn.Module, paths: Sequence[str]) -> str:
    """Return a pattern that matches exactly these modules, such as `layer1.*, layer2.0`."""
    modules = dict(model.named_modules())
    parts = []
    for parent, inside in groupby(paths, key=lambda path: path.rpartition(".")[0]):
        mine = list(inside)
        theirs = [n for n, child in modules[parent].named_children() if _has_parameters(child)]
        parts.append(f"{parent}.*" if parent and len(theirs) == len(mine) else ", ".join(mine))
    return ", ".join(parts)


def lies_in(name: str, prefixes: Iterable[str]) -> bool:
    """Return whether a name is one of `prefixes` or lies inside one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _rule(pattern: str) -> re.Pattern[str]:
    """Return the expression for a pattern in which `*` stands for one part of a name."""
    return re.compile(re.escape(pattern).replace(r"\*", "[^.]+").replace(r"\{\}", "[^.]+"))


def _near(name: str, names: Sequence[str]) -> str:
    """Return the end of a message on a name that does not exist: the names most like it."""
    close = difflib.get_close_matches(name, names, n=8, cutoff=0.5)
    return f"near it are: {', '.join(close)}" if close else f"there are: {', '.join(names[:12])}"


def some(names: Sequence[str]) -> str:
    """Return at most five names and the number of the others, as text."""
    if not names:
        return "nothing"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
