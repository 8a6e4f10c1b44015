"""A C function as ctypes offers it: takes what code passes to a `ctypes.CDLL`, and refuses what would be cut to 32 bits there.

A prototype is a string with a word for each parameter:

    pointer, size, long     64 bits: an address or handle, a size_t, an unsigned long long
    int, float              what they say
    *pointer, *size, ...    the address of one of those, to be written
    text                    a buffer to be written, its length being the next parameter
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from trt.strict import Strictness

_WIDTH = {"pointer": 8, "size": 8, "long": 8, "int": 4, "float": 4, "text": 8}
_simple = type(ctypes.c_int).__mro__[1]  # the metaclass has no public name
_byref = type(ctypes.byref(ctypes.c_int()))
_pointer = ctypes.POINTER(ctypes.c_int).__mro__[1]
_simple_data = ctypes.c_int.__mro__[1]


class Function:
    """`argtypes`, `restype`, `errcheck` are as in ctypes. `body` gets numbers and ctypes objects, and returns the result."""

    def __init__(self, name: str, prototype: str, body: Callable[..., Any]) -> None:
        self.__name__, self._words, self._body = name, prototype.split(), body
        self.argtypes: Any = None
        self.restype: Any = ctypes.c_int
        self.errcheck: Any = None

    def __call__(self, *args: Any) -> Any:
        if self.argtypes is not None and len(args) != len(self.argtypes):
            raise TypeError(f"{self.__name__}: this function takes {len(self.argtypes)} arguments ({len(args)} given)")
        if len(args) != len(self._words):
            raise Strictness(f"{self.__name__} takes ({', '.join(self._words)}), called with {len(args)} arguments")
        types = self.argtypes or [None] * len(args)
        if len(types) != len(args):
            raise Strictness(f"{self.__name__}: argtypes has {len(types)} entries for ({', '.join(self._words)})")
        values = [self._value(*one) for one in zip(args, self._words, types, strict=True)]
        result = self._result(self._body(*values))
        return result if self.errcheck is None else self.errcheck(result, self, args)

    def _result(self, result: Any) -> Any:
        if self.restype is ctypes.c_int:
            return result
        if self.restype is None or isinstance(self.restype, type):
            raise Strictness(f"{self.__name__} returns an error code, which restype {self.restype} loses")
        return self.restype(result)  # a Python callable, given the int

    def _value(self, arg: Any, word: str, argtype: Any) -> Any:
        """What the body gets: an int, a float, or for `*word` and `text` the ctypes object to write."""
        where = f"{self.__name__}({word})"
        if argtype is not None:
            arg = _converted(arg, argtype, where)
        if word.startswith("*") or word == "text":
            target = _target(arg)
            if target is None:
                raise Strictness(f"{where}: {arg!r} is not the address of a ctypes object")
            if word != "text" and ctypes.sizeof(target) != _WIDTH[word[1:]]:
                raise Strictness(f"{where}: {type(target).__name__} has {ctypes.sizeof(target)} bytes")
            return target
        value, width = _number(arg)
        if width != _WIDTH[word]:
            hint = "; without argtypes a Python int is passed as a C int" if width == 4 else ""
            raise Strictness(f"{where}: {arg!r} is passed in {8 * width} bits{hint}")
        return value


def _converted(arg: Any, argtype: Any, where: str) -> Any:
    """`arg` as ctypes would pass it under `argtype`."""
    try:
        argtype.from_param(arg)
    except TypeError as error:
        raise ctypes.ArgumentError(f"{where}: {error}") from error
    if isinstance(arg, int) or arg is None:
        return argtype(arg) if issubclass(argtype, _simple_data) else ctypes.c_void_p(arg)
    return arg


def _target(arg: Any) -> Any:
    if isinstance(arg, _byref):
        return arg._obj
    if isinstance(arg, _pointer):
        return arg.contents
    return arg if isinstance(arg, ctypes.Array) else None


def _number(arg: Any) -> tuple[Any, int]:
    """(value, bytes that it is passed in)."""
    if isinstance(arg, (bytes, ctypes.c_char_p)):
        return ctypes.cast(arg, ctypes.c_void_p).value or 0, 8
    if isinstance(arg, _simple_data):
        return arg.value or 0, ctypes.sizeof(arg)
    target = _target(arg)
    if target is not None:
        return ctypes.addressof(target), 8
    if arg is None:
        return 0, 8
    if isinstance(arg, int):
        return arg, 4
    if hasattr(arg, "_as_parameter_"):
        return _number(arg._as_parameter_)
    raise ctypes.ArgumentError(f"don't know how to convert {arg!r}")
