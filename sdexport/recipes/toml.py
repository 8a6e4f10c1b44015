"""A TOML document, and on which line each of its keys and items is: what the standard library's reader does not tell.

The document is read by tomllib. The lines come from a second walk over the same text, which may take for granted that it is TOML.
"""

from __future__ import annotations

import bisect
import re
import sys
from pathlib import Path
from typing import Any

from sdexport.errors import RecipeError
from sdruntime.errors import plain
from sdruntime.system.document import read_document

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LARGEST = 1 << 20  # bytes of a recipe
Where = tuple[str | int, ...]  # ("engines", 0, "batch", 1) is engines[0].batch[1]

_GAP = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(r'"""(?:\\.|[^\\])*?"{3,5}' r"|'''.*?'{3,5}" r'|"(?:\\.|[^"\\])*"' r"|'[^']*'", re.DOTALL)
_SCALAR = re.compile(r"[^,\]}#\n]+")


def read_toml(path: Path) -> tuple[dict[str, Any], dict[Where, int]]:
    """The document in `path`, and `lines_of` it. Raises RecipeError, with line and column for what is not TOML."""
    try:
        text = read_document(path, most=LARGEST).decode().replace("\r\n", "\n")
    except OSError as error:
        raise RecipeError(path, [f"{path}: not readable: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise RecipeError(path, [f"{path}: not UTF-8, from byte {error.start} on"]) from error
    except ValueError as error:
        raise RecipeError(path, [f"{path}: not readable: {plain(error)}"]) from error
    try:
        document = tomllib.loads(text)
        _check_numbers(document)
        return document, lines_of(text)
    except tomllib.TOMLDecodeError as error:
        what, _, place = str(error).removesuffix(")").rpartition(" (at ")
        found = re.fullmatch(r"line (\d+), column (\d+)", place)
        line, column = found.groups() if found else (text.count("\n") + 1, 1)  # "end of document"
        raise RecipeError(path, [f"{path}:{line}:{column}: not TOML: {what}"]) from error
    except ValueError as error:  # a whole number beyond 64 bits, or of more digits than Python reads
        raise RecipeError(path, [f"{path}: not readable: {error}"]) from error
    except RecursionError:
        raise RecipeError(path, [f"{path}: nested too deeply"]) from None


def _check_numbers(value: Any) -> None:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("a whole number is beyond the 64 bits that TOML has")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_numbers(inner)


def lines_of(text: str) -> dict[Where, int]:
    """The line, counted from 1, on which each key and each item of a list in a valid document begins."""
    return _Walk(text).lines


class _Walk:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.ends = [match.start() for match in re.finditer("\n", text)]
        self.lines: dict[Where, int] = {}
        self.last: dict[Where, int] = {}  # arrays of tables: the index of the newest
        table: Where = ()
        while self.peek():
            if self.peek("[["):
                table = self.array_header()
            elif self.peek("["):
                table = self.header()
            else:
                self.pair(table)

    def peek(self, sign: str = "") -> bool:
        """Whether `sign` (or anything at all) comes next, behind blanks and comments."""
        gap = _GAP.match(self.text, self.at)
        assert gap is not None
        self.at = gap.end()
        return self.at < len(self.text) and self.text.startswith(sign, self.at)

    def take(self, sign: str) -> bool:
        found = self.peek(sign)
        self.at += len(sign) if found else 0
        return found

    def match(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self.text, self.at)
        self.at = found.end() if found else self.at
        return found[0] if found else None

    def note(self, where: Where) -> None:
        self.lines.setdefault(where, bisect.bisect_left(self.ends, self.at) + 1)

    def key(self) -> list[str]:
        """A dotted key, its parts unquoted."""
        parts = []
        while True:
            self.peek()
            part = self.match(_STRING)
            parts.append(tomllib.loads(f"key = {part}")["key"] if part else self.match(_BARE) or "")
            if not self.take("."):
                return parts

    def inside(self, parts: list[str]) -> Where:
        """The place of a header's key: in an array of tables, it is in the newest."""
        where: Where = ()
        for part in parts:
            where = (*where, part)
            self.note(where)
            if where in self.last:
                where = (*where, self.last[where])
        return where

    def header(self) -> Where:
        self.take("[")
        where = self.inside(self.key())
        self.take("]")
        return where

    def array_header(self) -> Where:
        self.take("[[")
        *outer, name = self.key()
        where = (*self.inside(outer), name)
        self.note(where)
        self.last[where] = self.last.get(where, -1) + 1
        self.note((*where, self.last[where]))
        self.take("]]")
        return (*where, self.last[where])

    def pair(self, table: Where) -> None:
        begin = self.at
        where = table
        parts = self.key()
        end, self.at = self.at, begin
        for part in parts:
            where = (*where, part)
            self.note(where)
        self.at = end
        self.take("=")
        self.value(where)

    def value(self, where: Where) -> None:
        self.peek()
        self.note(where)
        if self.take("["):
            index = 0
            while not self.take("]"):
                self.value((*where, index))
                index += 1
                self.take(",")
        elif self.take("{"):
            while not self.take("}"):
                self.pair(where)
                self.take(",")
        elif self.match(_STRING) is None:
            self.match(_SCALAR)
