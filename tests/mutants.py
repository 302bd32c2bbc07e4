"""Mutation testing of the files that decide: each mutant changes one thing, and some test must notice. `python -m tests.mutants`.

A mutant runs in a fork of this process, which has imported what all have in common, so it costs its tests and little more.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy  # noqa: F401
import pytest

ROOT = Path(__file__).parent.parent
BRAIN = ("tests/brain",)
TARGETS: dict[str, tuple[str, ...]] = {
    "elastic_ep.core.recovery": BRAIN,
    "elastic_ep.core.membership": ("tests/core/test_elastic_state.py", *BRAIN),
    "elastic_ep.core.transfer": ("tests/core/test_transfer.py", *BRAIN),
    "elastic_ep.brain.steps": BRAIN,
}
TIMEOUT_S = 120.0
"""a mutant that makes tests run for so long is noticed, too"""

_COMPARE: dict[type, type] = {
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
}
_ARITHMETIC: dict[type, type] = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.BitOr: ast.BitAnd}


class Mutant(NamedTuple):
    module: str
    line: int
    what: str
    source: str


def changes(node: ast.AST) -> Iterator[tuple[str, Callable[[Any], None]]]:
    """(description, what to do to the same node of a copy) for each way to spoil a node."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARE:
        other = _COMPARE[type(node.ops[0])]
        yield f"{type(node.ops[0]).__name__} -> {other.__name__}", lambda n: n.ops.__setitem__(0, other())
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        operator = _ARITHMETIC[type(node.op)]
        yield f"{type(node.op).__name__} -> {operator.__name__}", lambda n: setattr(n, "op", operator())
    if isinstance(node, ast.BoolOp):
        swapped = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield f"{type(node.op).__name__} -> {swapped.__name__}", lambda n: setattr(n, "op", swapped())
    if isinstance(node, ast.If | ast.IfExp):
        yield "condition negated", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield f"{node.value} -> {node.value + 1}", lambda n: setattr(n, "value", n.value + 1)
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield f"{node.value} -> {not node.value}", lambda n: setattr(n, "value", not n.value)
    body = getattr(node, "body", None)
    if isinstance(body, list):
        for i, statement in enumerate(body):
            if isinstance(statement, ast.Assign | ast.AugAssign) or (
                isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
            ):
                yield f"dropped: {ast.unparse(statement)[:60]}", lambda n, i=i: n.body.__setitem__(i, ast.Pass())


def mutants_of(module: str) -> list[Mutant]:
    """All mutants of one file; class bodies and annotations are left alone."""
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in _code(function)}
    found = []
    for place, node in enumerate(ast.walk(tree)):
        if id(node) not in inside:
            continue
        for what, change in changes(node):
            other = copy.deepcopy(tree)
            target = next(n for i, n in enumerate(ast.walk(other)) if i == place)
            change(target)
            found.append(Mutant(module, getattr(node, "lineno", 0), what, ast.unparse(ast.fix_missing_locations(other))))
    return found


def _code(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """A function and what it runs; not its arguments' annotations."""
    yield function
    for statement in function.body:
        yield from ast.walk(statement)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the mutant in place of its module."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        return importlib.util.spec_from_loader(name, self) if name == self.mutant.module else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.mutant.source, f"<mutant of {self.mutant.module}>", "exec"), module.__dict__)


def is_noticed(mutant: Mutant) -> bool:
    """Whether a test fails, or does not end."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        sys.meta_path.insert(0, Finder(mutant))
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *TARGETS[mutant.module]])))
    handle = os.pidfd_open(pid)
    try:
        ended, _, _ = select.select([handle], [], [], TIMEOUT_S)
        if not ended:
            os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1] != 0
    finally:
        os.close(handle)


def main() -> int:
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("--count", type=int, help="how many, drawn by the seed; all if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="modules whose name contains this")
    args = parser.parse_args()
    os.chdir(ROOT)
    modules = [module for module in TARGETS if args.only in module]
    for module in modules:
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
        if is_noticed(Mutant(module, 0, "unchanged", source)):
            print(f"the tests of {module} fail without any change: {' '.join(TARGETS[module])}")
            return 2
    mutants = [mutant for module in modules for mutant in mutants_of(module)]
    random.Random(args.seed).shuffle(mutants)
    mutants = mutants[: args.count]
    started, survivors = time.monotonic(), 0
    for i, mutant in enumerate(mutants, 1):
        if not is_noticed(mutant):
            survivors += 1
            print(f"{i}/{len(mutants)} SURVIVED {mutant.module}:{mutant.line} {mutant.what}", flush=True)
    noticed = len(mutants) - survivors
    share = noticed / max(1, len(mutants))
    print(f"{noticed} of {len(mutants)} mutants noticed ({share:.1%}), {time.monotonic() - started:.0f} s, seed {args.seed}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
