"""Print the Python surface of a TensorRT binding as JSON. Run by `surface.py` in a process of its own; imports nothing of ours.

python dump.py FOLDER MODULE
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from typing import Any

_OPERATORS = ("__lt__", "__le__", "__gt__", "__ge__", "__and__", "__or__", "__invert__")
_PYBIND_NOISE = ("__doc__", "__module__", "__dict__", "__weakref__", "__members__", "__getstate__", "__setstate__")


def is_enum(thing: type) -> bool:
    return "__members__" in thing.__dict__


def python_signature(function: Any) -> str:
    return f"{function.__name__}{inspect.signature(function)}"


def described(value: Any, known: dict[int, str]) -> dict[str, Any] | None:
    """One attribute of a class; None for what is no part of the surface."""
    if isinstance(value, staticmethod):
        return {"kind": "static", "doc": value.__func__.__doc__ or ""}
    if isinstance(value, property):
        return {
            "kind": "property",
            "readable": value.fget is not None,
            "writable": value.fset is not None,
            "doc": (value.fget and value.fget.__doc__) or "",
            "setter": (value.fset and value.fset.__doc__) or "",
        }
    if isinstance(value, type):
        return {"kind": "class", "target": known.get(id(value), value.__name__)}
    if is_enum(type(value)):
        return {"kind": "enum", "of": known[id(type(value))], "member": value.name}
    if inspect.isfunction(value):
        return {"kind": "method", "doc": python_signature(value)}
    if type(value).__name__ == "instancemethod":
        return {"kind": "method", "doc": value.__doc__ or ""}
    return None


def found_classes(module: Any) -> dict[str, type]:
    """Every class by its dotted name, the nested ones too, each once."""
    classes: dict[str, type] = {}

    def visit(thing: type, name: str) -> None:
        if thing in classes.values():
            return
        classes[name] = thing
        for key, value in vars(thing).items():
            if isinstance(value, type) and key != "__class__":
                visit(value, f"{name}.{key}")

    for name in sorted(vars(module)):  # ILogger before Logger, which only lends its Severity
        if isinstance(vars(module)[name], type):
            visit(vars(module)[name], name)
    return classes


def dumped(module: Any) -> dict[str, Any]:
    classes = found_classes(module)
    known = {id(thing): name for name, thing in classes.items()}
    surface: dict[str, Any] = {"version": module.__version__, "classes": {}, "constants": {}, "functions": {}}
    for name, thing in classes.items():
        values = {}
        if is_enum(thing):
            values = {key: int(member) for key, member in thing.__members__.items()}  # type: ignore[attr-defined]
        members = {}
        for key, value in vars(thing).items():
            own = is_enum(thing) and (key in values or (key.startswith("__") and key not in ("__init__", *_OPERATORS)))
            if key in _PYBIND_NOISE or "pybind11" in key or own:
                continue
            if (described_ := described(value, known)) is not None:
                members[key] = described_
        bases = [known[id(base)] for base in thing.__bases__ if id(base) in known]
        surface["classes"][name] = {"bases": bases, "enum": values, "is_enum": is_enum(thing), "members": members}
    for name, value in vars(module).items():
        if isinstance(value, type):
            assert known[id(value)] == name, f"{name} is another name of {known[id(value)]}"
        elif is_enum(type(value)):
            surface["constants"][name] = [known[id(type(value))], value.name]
        elif inspect.isfunction(value):
            surface["functions"][name] = python_signature(value)
        elif inspect.isbuiltin(value) or type(value).__name__ == "PyCapsule":
            surface["functions"][name] = value.__doc__ or ""
    return surface


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    print(json.dumps(dumped(importlib.import_module(sys.argv[2]))))
