"""Which members of TensorRT source files use, so that a test can demand that each exists in each version, and was exercised.

Attributes have no types here: a use is an attribute with the name of a member of a class that the files can come by, beginning
with those that they name (`trt.Builder`) and going on to what the members that they use take and return. What is certainly
something else is omitted: attributes of imported modules (other than TensorRT's own), of `self`, and private ones.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from trt.surface import Surface

_WORD = re.compile(r"[A-Za-z_][\w.]*")


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


def uses_in(sources: Mapping[str, str], surfaces: Collection[Surface]) -> list[Use]:
    """What `sources`, by file name, use of any version, in order."""
    trees = {file: ast.parse(source) for file, source in sources.items()}
    attributes = {node.attr for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    attributes |= {name for tree in trees.values() for name in (*_asked(tree), *_defined(tree))}
    names = {name for surface in surfaces for name in _names(surface, attributes)}
    return sorted(use for file, tree in trees.items() for use in _uses(tree, file, names))


def absent(found: Iterable[Use], surface: Surface) -> list[Use]:
    """The uses of what a version does not have, but for guarded ones."""
    here = set(surface.names())
    return [use for use in found if use.name not in here and not use.guarded]


def unexercised(found: Iterable[Use], surface: Surface, used: Collection[tuple[str, str]]) -> list[Use]:
    """The uses of what a version has and no test has used, `used` being what its fakes recorded."""
    here, made = set(surface.names()), {member for _, member in used} | {name.rsplit(".", 1)[-1] for name, _ in used}
    return [use for use in found if use.name in here and use.name not in made]


def _names(surface: Surface, attributes: Collection[str]) -> Iterator[str]:
    yield from (name for name in (*surface.constants, *surface.functions) if name in attributes)
    for path in _classes(surface, attributes):
        yield path.rsplit(".", 1)[-1]
        yield from surface.classes[path].values
        yield from (name for name in surface.classes[path].members if not name.startswith("__"))


def _classes(surface: Surface, attributes: Collection[str]) -> set[str]:
    """The classes that one comes by with these attributes."""
    found: set[str] = set()
    todo = [path for path in surface.classes if path.rsplit(".", 1)[-1] in attributes]
    while todo:
        path = todo.pop()
        if path in found or path not in surface.classes:
            continue
        found.add(path)
        described = surface.classes[path]
        todo += described.bases
        for name, member in described.members.items():
            if name in attributes or name == "__init__":
                todo.append(member.target)
                texts = [signature.returns for signature in member.signatures]
                texts += [p.type for signature in (*member.signatures, *member.setters) for p in signature.parameters]
                words = [word for text in texts for word in _WORD.findall(text)]
                todo += [*words, *(word.removeprefix("I") for word in words)]  # IParserError is ParserError in Python
    return found


def _uses(tree: ast.AST, file: str, names: Collection[str]) -> Iterator[Use]:
    elsewhere, guards = _other_modules(tree) | {"self", "cls"}, set(_guards(tree))
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    behind = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) and _asked(node.test) for inner in _body(node)}
    for name, line in _defined(tree).items():
        if name in names:
            yield Use(file=file, line=line, name=name, how="override")
    for name, line in _asked(tree).items():
        if name in names:
            yield Use(file=file, line=line, name=name, how="get", guarded=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr not in names or node.attr.startswith("_"):
            continue
        if isinstance(node.value, ast.Name) and node.value.id in elsewhere:
            continue
        how = "call" if id(node) in called else "get" if isinstance(node.ctx, ast.Load) else "set"
        yield Use(file=file, line=node.lineno, name=node.attr, how=how, guarded=node.attr in guards or id(node) in behind)


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


def _defined(tree: ast.AST) -> dict[str, int]:
    """The methods of classes whose base is an attribute (`trt.ILogger`), with their lines."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Attribute) for base in node.bases):
            found |= {one.name: one.lineno for one in node.body if isinstance(one, ast.FunctionDef)}
    return found


def _body(node: ast.If) -> Iterator[ast.AST]:
    for statement in node.body:
        yield from ast.walk(statement)


def _asked(tree: ast.AST) -> dict[str, int]:
    """The names in hasattr(x, "name") and getattr(x, "name", ...), with their lines."""
    found: dict[str, int] = {}
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
