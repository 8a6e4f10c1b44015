"""Read a pickle as data: no name in it is imported, no object is made, nothing runs.

A pickle is a program for a stack machine. This machine has the operations that Python writes since protocol 2. Where Python's
would import a name, it pushes the `Name`; where Python's would call something, it pushes a `Call`. Python's own Unpickler with a
`find_class` of its own runs nothing either, but a few bytes can make it allocate gigabytes (an index of its memo) or overflow the
stack (the hash of a nested key).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MOST_OPERATIONS = 4_000_000  # a weight takes about 25; a checkpoint of training with 10,000 tensors 0.5 million
_STOP, _LINE_END = ord("."), b"\n"
_EMPTY_DICT = "collections.OrderedDict"  # what torch makes a state dict of


@dataclass(frozen=True, slots=True, eq=False)
class Name:
    """A name that the pickle would have Python import."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """An object that the pickle would have Python make, by calling `name`. Its later items and state are dropped."""

    name: str
    arguments: Any


@dataclass(frozen=True, slots=True, eq=False)
class Persistent:
    """A reference to something outside of the pickle: to a storage, in torch's files."""

    id: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Pickle:
    """What a pickle holds, its references, and the offset at which it ends."""

    value: Any
    references: tuple[Persistent, ...]
    end: int


def read_pickle(data: bytes, start: int = 0) -> Pickle:
    """Return what the pickle at `start` holds. Raises ValueError if it is cut off or damaged."""
    machine = _Machine(data, start)
    value = machine.run()
    return Pickle(value=value, references=tuple(machine.references), end=machine.place)


def kind_of(value: Any) -> str:
    """Return what a value is, for an error."""
    return f"{value.name:.80}" if isinstance(value, Name | Call) else type(value).__name__


class _Machine:
    def __init__(self, data: bytes, place: int) -> None:
        self.data, self.place = data, place
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the open marks
        self.memo: dict[int, Any] = {}
        self.references: list[Persistent] = []

    def run(self) -> Any:
        for _ in range(MOST_OPERATIONS):
            code = self.number(1)
            if code == _STOP:
                return self.pop()
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise ValueError(f"the pickle has an unknown operation {code:#04x} at byte {self.place - 1:,}")
            operation(self)
        raise ValueError(f"the pickle has more than the {MOST_OPERATIONS:,} operations that are read")

    def take(self, size: int) -> bytes:
        part = self.data[self.place : self.place + size]
        if len(part) < size:
            raise ValueError(f"the pickle is cut off after {len(self.data):,} bytes")
        self.place += size
        return part

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        end = self.data.find(_LINE_END, self.place)
        return _text(self.take((end if end >= 0 else len(self.data)) + 1 - self.place)[:-1])

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError(f"the pickle is damaged: nothing is on its stack at byte {self.place:,}")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        if not self.below:
            raise ValueError(f"the pickle is damaged: no mark is on its stack at byte {self.place:,}")
        items, self.stack = self.stack, self.below.pop()
        return items

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def put(self, index: int) -> None:
        value = self.pop()
        self.push(value)
        self.memo[index] = value

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError(f"the pickle is damaged: it has no object {index:,} at byte {self.place:,}")
        self.push(self.memo[index])

    def append(self, items: list[Any]) -> None:
        owner = self.pop()
        if isinstance(owner, list):
            owner.extend(items)
        self.push(owner)

    def set(self, items: list[Any]) -> None:
        owner = self.pop()
        if isinstance(owner, dict):
            # a key is hashed only if that takes a bounded time; another one stays as an entry that has no name
            owner.update((key if isinstance(key, _KEYS) else Call(kind_of(key), ()), value) for key, value in _pairs(items))
        self.push(owner)

    def name(self, module: Any, name: Any) -> None:
        self.push(Name(f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?"))

    def call(self, arguments: Any) -> None:
        function = self.pop()
        name = function.name if isinstance(function, Name) else "?"
        self.push({} if name == _EMPTY_DICT else Call(name, arguments))

    def refer(self) -> None:
        self.references.append(Persistent(self.pop()))
        self.push(self.references[-1])

    def tuple(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push((*reversed(items),))


_KEYS = (str, int, float, type(None))


def _pairs(items: list[Any]) -> zip[tuple[Any, Any]]:
    if len(items) % 2:
        raise ValueError("the pickle is damaged: a key without a value")
    return zip(items[::2], items[1::2], strict=True)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _long(machine: _Machine) -> None:
    machine.push(int.from_bytes(machine.take(machine.number(1)), "little", signed=True))


def _named(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.name(module, name)


def _of_one_key(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set([key, value])


def _with_keywords(machine: _Machine) -> None:
    machine.pop()
    machine.call(machine.pop())


def _duplicate(machine: _Machine) -> None:
    value = machine.pop()
    machine.stack += [value, value]


_Operation = Callable[[_Machine], Any]


def _sized(width: int, value_of: Callable[[bytes], Any]) -> _Operation:
    return lambda machine: machine.push(value_of(machine.take(machine.number(width))))


_OPERATIONS: Mapping[int, _Operation] = {
    0x80: lambda machine: machine.take(1),  # PROTO
    0x95: lambda machine: machine.take(8),  # FRAME
    # numbers and text
    ord("N"): lambda machine: machine.push(None),
    0x88: lambda machine: machine.push(True),
    0x89: lambda machine: machine.push(False),
    ord("K"): lambda machine: machine.push(machine.number(1)),
    ord("M"): lambda machine: machine.push(machine.number(2)),
    ord("J"): lambda machine: machine.push(int.from_bytes(machine.take(4), "little", signed=True)),
    0x8A: _long,  # LONG1
    ord("G"): lambda machine: machine.push(struct.unpack(">d", machine.take(8))[0]),
    ord("U"): _sized(1, _text),  # strings of Python 2
    ord("T"): _sized(4, _text),
    0x8C: _sized(1, _text),
    ord("X"): _sized(4, _text),
    0x8D: _sized(8, _text),
    ord("C"): _sized(1, bytes),
    ord("B"): _sized(4, bytes),
    0x8E: _sized(8, bytes),
    0x96: _sized(8, bytes),  # BYTEARRAY8
    # containers
    ord("]"): lambda machine: machine.push([]),
    ord("}"): lambda machine: machine.push({}),
    ord(")"): lambda machine: machine.push(()),
    0x8F: lambda machine: machine.push(Call("builtins.set", ())),
    ord("t"): lambda machine: machine.push(tuple(machine.pop_to_mark())),
    0x85: lambda machine: machine.tuple(1),
    0x86: lambda machine: machine.tuple(2),
    0x87: lambda machine: machine.tuple(3),
    ord("a"): lambda machine: machine.append([machine.pop()]),
    ord("e"): lambda machine: machine.append(machine.pop_to_mark()),
    ord("s"): _of_one_key,
    ord("u"): lambda machine: machine.set(machine.pop_to_mark()),
    0x90: lambda machine: machine.pop_to_mark(),  # ADDITEMS: the set stays empty
    0x91: lambda machine: machine.push(Call("builtins.frozenset", (*machine.pop_to_mark(),))),
    # the stack and the memo
    ord("("): lambda machine: machine.mark(),
    ord("0"): lambda machine: machine.pop(),
    ord("1"): lambda machine: machine.pop_to_mark(),
    ord("2"): _duplicate,
    ord("q"): lambda machine: machine.put(machine.number(1)),
    ord("r"): lambda machine: machine.put(machine.number(4)),
    0x94: lambda machine: machine.put(len(machine.memo)),  # MEMOIZE
    ord("h"): lambda machine: machine.get(machine.number(1)),
    ord("j"): lambda machine: machine.get(machine.number(4)),
    # what Python would import, call and load
    ord("c"): lambda machine: machine.name(machine.line(), machine.line()),
    0x93: _named,  # STACK_GLOBAL
    ord("R"): lambda machine: machine.call(machine.pop()),
    0x81: lambda machine: machine.call(machine.pop()),  # NEWOBJ
    0x92: _with_keywords,  # NEWOBJ_EX
    ord("b"): lambda machine: machine.pop(),  # BUILD: the state is dropped
    ord("Q"): lambda machine: machine.refer(),
}
