"""The ways to spoil a source file: one small change of its syntax tree each. What a mutant is; `tests.mutants` runs them."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list"}
_DROPPED = (ast.Assign, ast.AugAssign, ast.Raise, ast.Continue, ast.Break)

Change = Callable[[Any], Any]
"""what to do to the same node of a copy of the tree"""
Spoilt = tuple[ast.AST, str, Change]
"""(where, what, how)"""


class Mutant(NamedTuple):
    """A file to be spoilt. `spoil` does it to a fresh tree; the source is made where it runs, as that takes longer than many a test."""

    module: str
    path: Path
    line: int
    what: str
    spoil: Callable[[ast.Module], Any]

    def __str__(self) -> str:
        return f"{self.module}:{self.line} {self.what}"

    @property
    def text(self) -> str:
        """The line that it changes."""
        return self.path.read_text().splitlines()[self.line - 1].strip() if self.line else ""

    def source(self) -> str:
        tree = ast.parse(self.path.read_text())
        self.spoil(tree)
        return ast.unparse(ast.fix_missing_locations(tree))


def _set(name: str, value: Callable[[Any], Any]) -> Change:
    """Replace one attribute of a node by what the old one gives."""
    return lambda node: setattr(node, name, value(getattr(node, name)))


def _put(name: str, index: int, value: Callable[[Any], Any]) -> Change:
    return lambda node: getattr(node, name).__setitem__(index, value(getattr(node, name)[index]))


def _cut(*names: str, index: int) -> Change:
    return lambda node: [getattr(node, name).pop(index) for name in names]


def _negated(test: Any) -> ast.expr:
    return ast.UnaryOp(ast.Not(), test)


def changes(node: ast.AST) -> Iterator[Spoilt]:
    """Each way to spoil a node."""
    yield from _operators(node)
    yield from _values(node)
    yield from _statements(node)


def _operators(node: ast.AST) -> Iterator[Spoilt]:
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            other = _COMPARE[type(operator)]
            what = f"{type(operator).__name__} -> {other.__name__} in {ast.unparse(node)}"
            yield node, what, _put("ops", i, lambda _, other=other: other())
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        other = _ARITHMETIC[type(node.op)]
        yield node, f"{type(node.op).__name__} -> {other.__name__} in {ast.unparse(node)}", _set("op", lambda _: other())
    if isinstance(node, ast.BoolOp):
        swapped = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield node, f"{type(node.op).__name__} -> {swapped.__name__} in {ast.unparse(node)}", _set("op", lambda _: swapped())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        yield node, f"~ dropped in {ast.unparse(node)}", _set("op", lambda _: ast.UAdd())
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield node, f"condition negated: {ast.unparse(node.test)}", _set("test", _negated)
    if isinstance(node, ast.comprehension):
        for i, test in enumerate(node.ifs):
            yield test, f"filter dropped: {ast.unparse(test)}", _cut("ifs", index=i)
            yield test, f"filter negated: {ast.unparse(test)}", _put("ifs", i, _negated)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
        other_name = _CALLS[node.func.id]
        yield node, f"{node.func.id} -> {other_name} in {ast.unparse(node)[:80]}", _set("func", lambda _: ast.Name(other_name, ast.Load()))


def _values(node: ast.AST) -> Iterator[Spoilt]:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield node, f"{node.value} -> {node.value + 1}", _set("value", lambda value: value + 1)
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield node, f"{node.value} -> {not node.value}", _set("value", lambda value: not value)
    if isinstance(node, ast.Dict):
        for i, (key, value) in enumerate(zip(node.keys, node.values, strict=True)):
            entry = f"{ast.unparse(key)}: {ast.unparse(value)}" if key else f"**{ast.unparse(value)}"
            yield value, f"entry dropped: {entry[:80]}", _cut("keys", "values", index=i)


def _statements(node: ast.AST) -> Iterator[Spoilt]:
    if isinstance(node, ast.ClassDef | ast.Module):
        return
    for name in ("body", "orelse"):
        for i, statement in enumerate(block if isinstance(block := getattr(node, name, None), list) else ()):
            is_call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
            is_bare_return = isinstance(statement, ast.Return) and statement.value is None
            if isinstance(statement, _DROPPED) or is_call or is_bare_return:
                yield statement, f"dropped: {ast.unparse(statement)[:80]}", _put(name, i, lambda _: ast.Pass())


def mutants_of(module: str, path: Path) -> list[Mutant]:
    """All mutants of one file; annotations, which nothing reads, are left alone."""
    tree = ast.parse(path.read_text())
    notes = {id(inner) for node in ast.walk(tree) for note in _annotations(node) for inner in ast.walk(note)}
    found = []
    for place, node in enumerate(ast.walk(tree)):
        for where, what, change in changes(node) if id(node) not in notes else ():
            found.append(Mutant(module, path, getattr(where, "lineno", 0), what, _at(place, change)))
    return found


def _at(place: int, change: Change) -> Change:
    """Do it to the node at that place of the walk."""
    return lambda tree: change(next(node for i, node in enumerate(ast.walk(tree)) if i == place))


def _annotations(node: ast.AST) -> Iterator[ast.AST]:
    for name in ("annotation", "returns"):
        note = getattr(node, name, None)
        if note is not None:
            yield note


def unchanged(module: str, path: Path) -> Mutant:
    """Goes the way of a mutant, and must survive."""
    return Mutant(module, path, 0, "unchanged", lambda tree: None)


def ruined(module: str, path: Path) -> Mutant:
    """Every function raises: if this one survives, mutants are not what the tests run."""

    def ruin(tree: ast.Module) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                node.body = [ast.parse('raise RuntimeError("ruined")').body[0]]

    return Mutant(module, path, 0, "every function raises", ruin)
