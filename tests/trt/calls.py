"""Which members of TensorRT a source file uses, so that a test can demand that each exists in each version, and was exercised.

Attributes have no types here: a use is any attribute whose name is the name of a member in some version. What is certainly
something else is left out: attributes of imported modules (other than TensorRT's own), of `self`, and private ones.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trt.surface import Surface


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Use:
    """`how`: "call", "get", "set", or "override" for a method that a subclass of one of TensorRT's classes defines."""

    file: str
    line: int
    name: str
    how: str
    guarded: bool = False  # the file asks whether it, or what it goes with, is there

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.name} ({self.how})"


def names_of(surfaces: Iterable[Surface]) -> set[str]:
    """Every member's name in any of the versions."""
    return {name for surface in surfaces for name in surface.names()}


def uses_in(paths: Iterable[Path], surfaces: Collection[Surface]) -> list[Use]:
    """What files use of any version, in order."""
    return sorted(use for path in paths for use in uses(path.read_text(encoding="utf-8"), path.name, surfaces))


def uses(source: str, file: str, surfaces: Collection[Surface]) -> list[Use]:
    tree = ast.parse(source)
    names, elsewhere, guards = names_of(surfaces), _other_modules(tree), set(_guards(tree))
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    behind = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) and _asked(node.test) for inner in _body(node)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Attribute) and base.attr in names for base in node.bases):
            methods = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name in names]
            found += [Use(file=file, line=one.lineno, name=one.name, how="override") for one in methods]
        if not isinstance(node, ast.Attribute) or node.attr not in names or node.attr.startswith("_"):
            continue
        if isinstance(node.value, ast.Name) and node.value.id in elsewhere | {"self", "cls"}:
            continue
        how = "call" if id(node) in called else "get" if isinstance(node.ctx, ast.Load) else "set"
        guarded = node.attr in guards or id(node) in behind
        found.append(Use(file=file, line=node.lineno, name=node.attr, how=how, guarded=guarded))
    found += [
        Use(file=file, line=line, name=name, how="get", guarded=True) for name, line in _asked(tree).items() if name in names
    ]
    return sorted(found)


def absent(found: Iterable[Use], surface: Surface) -> list[str]:
    """The uses of what a version does not have, but for guarded ones."""
    here = set(surface.names())
    return [f"{surface.module} {surface.version} lacks {use}" for use in found if use.name not in here and not use.guarded]


def unexercised(
    found: Iterable[Use], surface: Surface, used: Collection[tuple[str, str]], apart: Collection[str] = ()
) -> list[str]:
    """The uses that a version has and no test made, `used` being what its fake recorded. `apart`: names that the files use of
    something else alone, such as the `shape` of an array; each of them must be needed."""
    here, made = set(surface.names()), {member for _, member in used} | {name.rsplit(".", 1)[-1] for name, _ in used}
    missing = [use for use in found if use.name in here and use.name not in made]
    faults = [f"{surface.module} {surface.version}: no test runs {use}" for use in missing if use.name not in apart]
    needless = sorted(set(apart) - {use.name for use in missing})
    return faults + [f"{surface.module} {surface.version}: {name} need not be set apart" for name in needless]


def _other_modules(tree: ast.AST) -> set[str]:
    """Names bound by imports, but for TensorRT's."""
    bound = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            origin = getattr(node, "module", None) or ""
            for alias in node.names:
                if not (origin or alias.name).startswith("tensorrt"):
                    bound.add((alias.asname or alias.name).split(".")[0])
    return bound


def _body(node: ast.If) -> Iterator[ast.AST]:
    for statement in node.body:
        yield from ast.walk(statement)


def _asked(tree: ast.AST) -> dict[str, int]:
    """The names in hasattr(x, "name") and getattr(x, "name", ...), with their lines."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                found.setdefault(name.value, node.lineno)
    return found


def _guards(tree: ast.AST) -> Iterator[str]:
    """The names that a file asks for before it uses them: with hasattr or getattr, or by a table, which is a dictionary at the
    top of the file with the names as its keys and the first versions that have them as values."""
    yield from _asked(tree)
    for node in tree.body if isinstance(tree, ast.Module) else []:
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        if isinstance(value, ast.Dict) and value.values and all(isinstance(one, ast.Tuple) for one in value.values):
            yield from (str(key.value).rsplit(".", 1)[-1] for key in value.keys if isinstance(key, ast.Constant))
