"""Make small changes to the core, one at a time, and list those that no test notices.

    python -m scripts.mutants --number 150 --seed 0     # or: make mutants

Each change is tried on a copy of the checkout, against the tests of the room of the changed file, with
the file's own tests first. Every possible change has a place in an order that follows from the seed and
the change itself. So the sample is the same next time, but for code that was written since.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = (
    "client/probe.py",
    "client/training.py",
    "exchange/*.py",
    "selection/*.py",
    "server/aggregation.py",
    "strategies/*.py",
)
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True)
class Mutant:
    """One change: the bytes from `start` to `end` of a file's source become `text`."""

    file: str
    line: int
    around: str
    start: int
    end: int
    before: str
    text: str

    def place(self, seed: int) -> str:
        """Return the mutant's place in the order of a seed, wherever in its file its line stands."""
        change = f"{seed} {self.file} {self.around} {self.before} {self.text}"
        return hashlib.sha256(change.encode()).hexdigest()

    def __str__(self) -> str:
        before, text = (" ".join(part.split())[:90] for part in (self.before, self.text))
        return f"layerfed/{self.file}:{self.line}: {before}  ->  {text}   in   {self.around}"


def changed(node: ast.AST) -> ast.AST | None:
    """Return a node with one change, or None if no kind of change fits it."""
    new = copy.deepcopy(node)
    match new:
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            new.ops = [SWAPS[type(op)]()]  # type: ignore[list-item]
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in SWAPS:
            new.op = SWAPS[type(op)]()  # type: ignore[assignment]
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            return operand
        case ast.Constant(value=bool(value)):
            new.value = not value
        case ast.Constant(value=int(value)):
            new.value = value + 1
        case ast.Constant(value=float(value)):
            new.value = value * 2 or 1.0
        case ast.IfExp(test=test):
            new.test = ast.UnaryOp(ast.Not(), test)
        case ast.Expr(value=ast.Call(func=called)) if ast.unparse(called) != "log":
            return ast.Pass()
        case _:
            return None
    return new


def nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of code that runs in a function: no annotations, decorators or messages."""
    inert = {"annotation", "returns", "decorator_list"}
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if name in inert or not isinstance(child, ast.AST):
                continue
            if isinstance(child, ast.JoinedStr | ast.Raise):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            yield child
            yield from nodes(child)


def mutants(file: Path) -> Iterator[Mutant]:
    """Yield every mutant of a file."""
    source = file.read_bytes()
    starts, lines = [0], source.splitlines(keepends=True)
    for line in lines:
        starts.append(starts[-1] + len(line))
    for node in nodes(ast.parse(source)):
        new = changed(node)
        if new is not None and isinstance(node, ast.expr | ast.stmt):
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
            text = ast.unparse(new)
            yield Mutant(
                file.relative_to(ROOT / "layerfed").as_posix(),
                node.lineno,
                lines[node.lineno - 1].decode().strip(),
                start,
                end,
                source[start:end].decode(),
                text if isinstance(node, ast.stmt) else f"({text})",
            )


def tests_of(file: str, copy_of_root: Path) -> list[str]:
    """Return the files of tests of a file's room, those named like the file first."""
    room, name = file.split("/")
    found = sorted((copy_of_root / "tests" / room).glob("test_*.py"))
    own = f"test_{name.removesuffix('.py')}"
    return [str(test) for test in sorted(found, key=lambda test: not test.stem.startswith(own))]


def outcome(tests: list[str], folder: Path, seconds: int) -> str:
    """Run tests in a process of its own that has the heavy libraries already; say how they ended."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        # Time of the processor, so that the outcome does not depend on what else runs.
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", "not slow"]
        os._exit(int(pytest.main([*options, "-o", "timeout=0", *tests])))
    deadline = time.monotonic() + 20 * seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.1)
    if os.WIFSIGNALED(status):
        return "timeout" if os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU) else "noticed"
    return {0: "survived", 1: "noticed"}.get(os.WEXITSTATUS(status), "noticed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--skip", type=int, default=0, help="the first ones of the order, tried before"
    )
    parser.add_argument("--only", default="", help="files whose path has this in it")
    parser.add_argument("--seconds", type=int, default=300, help="processor time for one mutant")
    arguments = parser.parse_args()
    files = [f for pattern in CORE for f in sorted((ROOT / "layerfed").glob(pattern))]
    every = [m for file in files if arguments.only in str(file) for m in mutants(file)]
    every.sort(key=lambda mutant: mutant.place(arguments.seed))
    for library in ("torch", "flwr.clientapp", "flwr.serverapp"):
        import_module(library)

    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="layerfed-mutants-") as private:
        folder = Path(private)
        for part in ("layerfed", "layerfed_assets", "tests", "conf", "benchmarks", "scripts"):
            shutil.copytree(ROOT / part, folder / part)
        shutil.copy(ROOT / "pyproject.toml", folder)
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sample = every[arguments.skip : arguments.number]
        for room, one in sorted({m.file.split("/")[0]: m.file for m in sample}.items()):
            if outcome(tests_of(one, folder), folder, arguments.seconds) != "survived":
                parser.error(f"tests/{room} does not pass without any change")
        for mutant in sample:
            place = folder / "layerfed" / mutant.file
            source = place.read_bytes()
            place.write_bytes(source[: mutant.start] + mutant.text.encode() + source[mutant.end :])
            found = outcome(tests_of(mutant.file, folder), folder, arguments.seconds)
            place.write_bytes(source)
            counts[found] += 1
            print(f"{found:9}{mutant}", flush=True)
    print(f"{len(every)} mutants, of which {counts.total()} tried: {dict(counts)}")


if __name__ == "__main__":
    main()
