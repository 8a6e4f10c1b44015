"""The signatures in a pybind11 docstring, read and then held against a call.

create_network(self: tensorrt_bindings.tensorrt.Builder, flags: int = 0) -> tensorrt_bindings.tensorrt.INetworkDefinition
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_OVERLOAD = re.compile(r"^\d+\. (.*)$", re.M)
_OURS = re.compile(r"\btensorrt\w*\.tensorrt(?:_rtx)?\.|\bnv(?:infer1|onnxparser)::(?:v_\d+_\d+::)?")
_BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """`type` is as pybind11 prints it, with TensorRT's own classes by their bare names; `default` None: it must be given."""

    name: str
    type: str
    default: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """Without `self`. Positional-only parameters are called arg0, arg1, ... by pybind11."""

    parameters: tuple[Parameter, ...]
    returns: str

    def __str__(self) -> str:
        texts = [f"{p.name}: {p.type}" + ("" if p.default is None else f" = {p.default}") for p in self.parameters]
        return f"({', '.join(texts)}) -> {self.returns}"


def signatures(doc: str, *, method: bool) -> tuple[Signature, ...]:
    """Every overload that a docstring lists. `method`: the first parameter is the object itself."""
    first = doc.strip().split("\n", 1)[0]
    lines = _OVERLOAD.findall(doc) if first.endswith("(*args, **kwargs)") and "Overloaded" in doc else [first]
    return tuple(_signature(_OURS.sub("", line), method=method) for line in lines if "(" in line)


def _signature(line: str, *, method: bool) -> Signature:
    start = line.index("(")
    end = _closing(line, start)
    parts = [part.strip() for part in split(line[start + 1 : end])]
    parameters = [_parameter(part) for part in parts if part and part not in ("*", "/")]
    return Signature(parameters=tuple(parameters[method:]), returns=line[end + 1 :].partition("->")[2].strip() or "object")


def _parameter(text: str) -> Parameter:
    declared, equals, default = text.partition(" = ") if ":" in text else text.partition("=")
    name, _, kind = declared.partition(":")
    return Parameter(name=name.strip(), type=kind.strip() or "object", default=default if equals else None)


def _closing(text: str, start: int) -> int:
    depth = 0
    for k in range(start, len(text)):
        if text[k] in _BRACKETS:
            depth += 1
        elif text[k] in _BRACKETS.values() and text[k - 1 : k + 1] != "->":
            depth -= 1
            if not depth:
                return k
    raise ValueError(f"no end of the parameters: {text}")


def split(text: str, by: str = ",") -> list[str]:
    """The parts between separators that are in no bracket."""
    parts, depth, start = [], 0, 0
    for k, letter in enumerate(text):
        if letter in _BRACKETS:
            depth += 1
        elif letter in _BRACKETS.values() and text[k - 1 : k + 1] != "->":
            depth -= 1
        elif letter == by and not depth:
            parts.append(text[start:k])
            start = k + 1
    return [*parts, text[start:]]


Instance = Callable[[Any, str], "bool | None"]  # of a class of the fake by name; None: there is no such class


def bind(signature: Signature, args: Sequence[Any], kwargs: dict[str, Any], instance: Instance) -> dict[str, Any] | str:
    """The arguments by name, those left to their default not among them; or why they do not fit."""
    parameters = signature.parameters
    if len(args) > len(parameters):
        return f"{len(args)} arguments are too many"
    bound = dict(zip([p.name for p in parameters], args, strict=False))
    for name, value in kwargs.items():
        if name in bound or name not in [p.name for p in parameters] or re.fullmatch(r"arg\d+", name):
            return f"keyword {name}"
        bound[name] = value
    for parameter in parameters:
        if parameter.name not in bound:
            if parameter.default is None:
                return f"{parameter.name} is missing"
        elif not fits(bound[parameter.name], parameter, instance):
            value = bound[parameter.name]
            return f"{parameter.name}: {type(value).__name__} {value!r:.60} is no {parameter.type}"
    return bound


def fits(value: Any, parameter: Parameter, instance: Instance) -> bool:
    return (value is None and parameter.default == "None") or is_a(value, parameter.type, instance)


def is_a(value: Any, kind: str, instance: Instance) -> bool:
    """Whether pybind11 would convert `value` to a parameter of this type. C++ types that it does not know are let through."""
    options = split(kind, "|")
    if len(options) > 1:
        return any(is_a(value, option.strip(), instance) for option in options)
    name, _, inside = kind.partition("[")
    name, inner = name.rsplit(".", 1)[-1], [part.strip() for part in split(inside[:-1])] if inside else []
    if name in _PLAIN:
        return _PLAIN[name](value)
    if name in ("Optional", "Union"):
        return (name == "Optional" and value is None) or any(is_a(value, option, instance) for option in inner)
    if name in ("List", "list", "Sequence", "Tuple", "tuple"):
        wanted = {"List": Sequence, "Sequence": Sequence, "Tuple": Sequence}.get(name, {"list": list, "tuple": tuple}.get(name))
        if isinstance(value, (str, bytes)) or not (isinstance(value, wanted) or _sequence_like(value, wanted)):  # type: ignore[arg-type]
            return False
        kinds = inner if name in ("Tuple", "tuple") and inner else inner * len(value)
        return len(kinds) in (0, len(value)) and all(is_a(*one, instance) for one in zip(value, kinds, strict=False))
    if name in ("Dict", "dict"):
        return isinstance(value, dict)
    answer = instance(value, kind)
    if not answer and name == "Dims":  # any sequence of integers is converted
        return is_a(value, "Sequence[int]", instance)
    return answer is None or answer


def _sequence_like(value: Any, wanted: Any) -> bool:
    return wanted is Sequence and hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, dict)


def _buffer(value: Any) -> bool:
    try:
        memoryview(value)
    except TypeError:
        return False
    return True


_PLAIN: dict[str, Callable[[Any], bool]] = {
    "int": lambda value: hasattr(value, "__index__"),
    "SupportsInt": lambda value: hasattr(value, "__index__"),
    "SupportsIndex": lambda value: hasattr(value, "__index__"),
    "float": lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool),
    "SupportsFloat": lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "bytes": lambda value: isinstance(value, bytes),
    "buffer": _buffer,
    "Buffer": _buffer,
    "object": lambda value: True,
    "Any": lambda value: True,
    "None": lambda value: value is None,
    "slice": lambda value: isinstance(value, slice),
    "Callable": callable,
}
