"""What a key of a network's config.json may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

REQUIRED = object()  # in place of a default: the file must have the key

# limits beyond any trained network, which keep a damaged config from requesting hours of work
_WIDEST, _DEEPEST, _LONGEST, VOCABULARY = 1 << 16, 64, 1 << 14, 1 << 22


@dataclass(frozen=True, slots=True)
class Values:
    """The supported values of a key, and their description in messages."""

    named: str
    holds: Callable[[Any], bool]

    def __or__(self, other: Values) -> Values:
        return Values(f"{self.named} or {other.named}", lambda value: self.holds(value) or other.holds(value))


def whole(low: int, high: int) -> Values:
    return Values(
        f"a whole number from {low} to {high}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
    )


def number(low: float, high: float) -> Values:
    return Values(
        f"a number from {low:g} to {high:g}",
        lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high,
    )


def one_of(*values: Any) -> Values:
    names = {None: "null", True: "true", False: "false"}
    named = ", ".join(names.get(value, str(value)) for value in values)
    return Values(named, lambda value: any(type(value) is type(known) and value == known for known in values))


def list_of(item: Values) -> Values:
    holds = item.holds
    return Values(
        f"a list, each {item.named}",
        lambda value: isinstance(value, list) and 0 < len(value) <= _DEEPEST and all(map(holds, value)),
    )


WIDTH, DEPTH, NULL = whole(1, _WIDEST), whole(1, _DEEPEST), one_of(None)
FLAG, OFF = one_of(True, False, None), one_of(False, None)  # the classes treat null as false
EPSILON, FACTOR = number(1e-12, 1.0), number(1e-6, 1e6)
LAYERS = whole(0, _DEEPEST)
ACTIVATIONS = one_of("silu", "swish", "mish", "gelu", "relu")
SIDE = whole(1, _LONGEST)
ANYTHING = Values("anything", lambda value: True)


@dataclass(frozen=True, slots=True)
class Key:
    """A key that is read. With `per_block`, the value applies to every block, or is a list with one value for each."""

    default: Any
    values: Values
    per_block: bool = False

    @property
    def accepted(self) -> Values:
        return self.values | list_of(self.values) if self.per_block else self.values


@dataclass(frozen=True, slots=True)
class Config:
    """The keys of a class: those that are read, and `idle` ones. Keys that begin with "_" are always idle."""

    read: Mapping[str, Key]
    idle: frozenset[str]
