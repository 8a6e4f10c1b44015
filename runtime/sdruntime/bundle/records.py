"""Read strict JSON into frozen dataclasses, and collect all faults.

The reader follows the type hints of a dataclass: str, int, float, bool, Literal, X | Y, tuple[X, ...], tuple[X, Y],
Mapping[str, X], nested dataclasses, and Annotated[X, check]. Faults are a missing key, an unknown key, a wrong type, and a value
for which `check` or the dataclass raises ValueError. Each fault starts with its full path ("engines[2].ranges.batch[1]").
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
import types
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from sdruntime.errors import shown
from sdruntime.system.document import LARGEST, read_document

DEEPEST = 64  # nested objects and lists. A manifest has 6
_LONG = re.compile("[0-9]{309}")  # a number that may exceed float64
_COMPARED = 20  # unknown keys for which similar names are searched, which is slow
_WRONG = object()
_SCALARS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_hints = functools.cache(functools.partial(get_type_hints, include_extras=True))


def json_from_text(text: str, *, infinity: bool = True) -> Any:
    """Parse JSON. Raises ValueError for a key that appears twice, NaN, a number beyond float64, and nesting deeper than DEEPEST.

    `infinity`: accept Infinity and -Infinity, because diffusers writes `"lambda_min_clipped": -Infinity` into every config of a
    DPM-Solver.
    """

    def constant(name: str) -> float:
        if name == "NaN" or not infinity:
            raise ValueError(f"{name} is not a JSON number")
        return float(name)

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"{digits:.40} is beyond float64")
        return value

    def whole(digits: str) -> int:
        number(digits)
        return int(digits)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(items)
        if len(mapping) < len(items):
            raise ValueError(f"the key {twins(key for key, _ in items)[0]!r:.200} appears twice")
        return mapping

    try:
        value = json.loads(
            text,
            object_pairs_hook=pairs,
            parse_constant=constant,
            parse_float=number,
            parse_int=whole if _LONG.search(text) else None,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if _depth_exceeds(value, DEEPEST):
        raise ValueError(f"nested too deeply: more than {DEEPEST} objects and lists within each other")
    return value


def read_json(path: Path, *, most: int = LARGEST) -> Any:
    """Read the document in `path` by the rules of `json_from_text`.

    Raises OSError; ValueError also if it is not UTF-8, has more than `most` bytes, or is not a regular file.
    """
    return json_from_text(read_document(path, most=most).decode())


def twins(names: Iterable[str]) -> list[str]:
    """Return the names that appear more than once, in the order of their first appearance."""
    return [name for name, count in Counter(names).items() if count > 1]


def _depth_exceeds(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, list | dict)
        ]
        if not level:
            return False
    return True


def json_from_record(value: Any) -> Any:
    """Convert dataclasses, tuples and mappings to lists and dicts, in the order of the fields. None fields are omitted."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: json_from_record(item) for name, item in fields.items() if item is not None}
    if isinstance(value, Mapping):
        return {key: json_from_record(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [json_from_record(item) for item in value]
    return value


def record_from_json(kind: Any, value: Any, *, where: str, faults: list[str]) -> Any:
    """Convert a JSON value to the type `kind` and append its faults to `faults`. If there are any, do not use the result."""
    result = _read(kind, value, where, faults)
    return None if result is _WRONG else result


def _read(kind: Any, value: Any, where: str, faults: list[str]) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _read_record(kind, value, where, faults)
    if origin is Annotated:
        return _read_checked(args[0], args[1], value, where, faults)
    if origin is Literal:
        return (
            value
            if any(value == choice and type(value) is type(choice) for choice in args)
            else _fault(faults, where, f"{shown(value)} is not one of {', '.join(map(str, args))}")
        )
    if origin in (Union, types.UnionType):
        return _read_union(args, value, where, faults)
    if origin is tuple:
        return _read_tuple(args, value, where, faults)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            return _fault(faults, where, f"expected an object, got {_shown(value)}")
        items = {key: _read(args[1], item, f"{where}.{key}" if where else key, faults) for key, item in value.items()}
        return _WRONG if _WRONG in items.values() else items
    # bool is a subclass of int, and JSON may write a float as an int
    accepted = (int, float) if kind is float else kind
    if isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)) and value not in (math.inf, -math.inf):
        if kind is int and not -(2**63) <= value < 2**64:
            return _fault(faults, where, f"expected a whole number of 64 bits, got {_shown(value)}")
        return kind(value)
    return _fault(faults, where, f"expected {_SCALARS[kind]}, got {_shown(value)}")


def _read_record(kind: Any, value: Any, where: str, faults: list[str]) -> Any:
    if not isinstance(value, dict):
        return _fault(faults, where, f"expected an object, got {_shown(value)}")
    before, hints, prefix = len(faults), _hints(kind), f"{where}." if where else ""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for number, key in enumerate(sorted(value.keys() - fields.keys())):
        near = difflib.get_close_matches(key, fields, n=3, cutoff=0.6) if number < _COMPARED and len(key) < 100 else []
        _fault(faults, prefix + key, f"unknown key; did you mean {', '.join(near)}?" if near else "unknown key")
    read = {}
    for name, field in fields.items():
        if name in value:
            read[name] = _read(hints[name], value[name], prefix + name, faults)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            _fault(faults, prefix + name, "missing")
    if len(faults) > before:
        return _WRONG
    try:
        return kind(**read)
    except ValueError as error:
        return _fault(faults, where, str(error))


def _read_checked(kind: Any, check: Callable[[Any], None], value: Any, where: str, faults: list[str]) -> Any:
    result = _read(kind, value, where, faults)
    if result is not _WRONG:
        try:
            check(result)
        except ValueError as error:
            return _fault(faults, where, str(error))
    return result


def _read_union(args: tuple[Any, ...], value: Any, where: str, faults: list[str]) -> Any:
    """Convert `value` to the first type that accepts it. If none does, add the faults of the type with the same JSON form."""
    kinds = [kind for kind in args if kind is not type(None)]
    if value is None and len(kinds) < len(args):
        return None
    closest: list[str] = []
    for kind in kinds:
        own: list[str] = []
        result = _read(kind, value, where, own)
        if result is not _WRONG and not own:
            return result
        if len(kinds) == 1 or _form_of(value) in _forms(kind):
            closest = own
    if not closest:
        return _fault(
            faults, where, f"expected {' or '.join(form for kind in kinds for form in _forms(kind))}, got {_shown(value)}"
        )
    faults.extend(closest)
    return _WRONG


def _forms(kind: Any) -> list[str]:
    """Return a description of the JSON values that a type accepts."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _forms(args[0])
    if origin is Literal:
        return [json.dumps(literal) for literal in args]
    if origin in (Union, types.UnionType):
        return [form for member in args for form in _forms(member)]
    if origin is tuple:
        return ["a list"]
    return [_SCALARS[kind]] if kind in _SCALARS else ["an object"]


def _form_of(value: Any) -> str:
    """Return a description of the type of a JSON value."""
    return _SCALARS.get(type(value), "a list" if isinstance(value, list) else "an object")


def _read_tuple(args: tuple[Any, ...], value: Any, where: str, faults: list[str]) -> Any:
    if not isinstance(value, list):
        return _fault(faults, where, f"expected a list, got {_shown(value)}")
    kinds = (args[0],) * len(value) if args[-1] is Ellipsis else args
    if len(kinds) != len(value):
        return _fault(faults, where, f"expected {len(kinds)} items, got {len(value)}")
    items = tuple(_read(kind, item, f"{where}[{i}]", faults) for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))
    return _WRONG if any(item is _WRONG for item in items) else items


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, default=str)  # TOML has dates
    except (ValueError, RecursionError):  # a number of 5,000 digits
        return shown(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _fault(faults: list[str], where: str, what: str) -> Any:
    faults.append(f"{where or 'the document':.400}: {what}")
    return _WRONG
