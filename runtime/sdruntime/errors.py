"""The errors of sdruntime, and the exit code of each.

SdruntimeError                 1   something failed
├── NotFinite                  1   an engine returned NaN or infinite values
├── QueueFull                  1   too many requests are waiting
├── QueueTimeout               1   a request waited for too long
├── VerificationFailed         4   outputs differ from the bundle's reference outputs; carries every fault
├── SettingError               2   an invalid value: size, steps, sampler, prompt, scheduler setting
│   ├── UnknownName            2   a name that is not in a list; carries similar names
│   ├── Unsupported            2   not supported by these engines, or by a worker process
│   └── BufferTooSmall         2   the image has more bytes than the caller's buffer
├── EnvironmentFault           3   this machine lacks something
│   ├── LibraryMissing         3   an engine library is not installed
│   ├── DeviceMissing          3   the device is not available
│   └── OutOfSpace             3   memory or disk ran out
├── BundleError                5   the bundle does not match its manifest; carries every fault
└── EngineError                5   no engine of the bundle fits the machine, the shape or the call

A message says what is wrong, where, the values, and how to fix it.
"""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

_MOST_LINES, _LONGEST_LINE = 100, 1000


def lines_of(faults: Sequence[str]) -> str:
    """Return the faults as a list for an error message, shortened: a damaged file may have 100,000 faults, or very long ones."""
    shown = [fault if len(fault) <= _LONGEST_LINE else f"{fault[:_LONGEST_LINE]}…" for fault in faults[:_MOST_LINES]]
    if len(faults) > _MOST_LINES:
        shown.append(f"… and {len(faults) - _MOST_LINES:,} more")
    return "\n".join(f"  - {fault}" for fault in shown)


def shown(value: object, most: int = 40) -> str:
    """Return a value's repr for an error message, at most `most` characters, even for a number of 5,000 digits."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"a number of {value.bit_length():,} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= most else f"{text[:most]}…"


class SdruntimeError(Exception):
    """Base class of the errors of sdruntime."""

    exit_code: ClassVar[int] = 1


class NotFinite(SdruntimeError):
    """An engine returned NaN or infinite values.

    `row`: the first affected row of the call, if the call is known.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class QueueFull(SdruntimeError):
    """The queue is full: try again later."""


class QueueTimeout(SdruntimeError):
    """A request waited in the queue for longer than its patience."""


class VerificationFailed(SdruntimeError):
    """Outputs differ from the bundle's reference outputs. `faults` has one line for each failed check."""

    exit_code = 4

    def __init__(self, where: object, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        count = f"{len(self.faults)} check{'s' if len(self.faults) != 1 else ''} failed"
        super().__init__(f"{where}: {count}\n{lines_of(self.faults)}")


class SettingError(SdruntimeError, ValueError):
    """A value passed by the caller is invalid."""

    exit_code = 2


class UnknownName(SettingError):
    """`name` is not one of `known`. `near` has the known names that are similar to it.

    `forms`: description of valid values, by name. `listed_by`: how to list the known names, if they are too many for a message.
    """

    def __init__(
        self, what: str, name: str, known: Iterable[str], *, forms: Mapping[str, str] | None = None, listed_by: str = ""
    ) -> None:
        known = sorted(set(known))
        by_folded = {other.casefold(): other for other in known}
        matches = difflib.get_close_matches(name.casefold(), by_folded, n=4, cutoff=0.5) if len(name) < 200 else []
        self.near = tuple(by_folded[other] for other in matches)
        hint = f"did you mean {', '.join(self.near)}?" if self.near else listed_by or f"known: {', '.join(known) or 'none'}"
        listed = "".join(f"\n  - {option}: {form}" for option, form in (forms or {}).items())
        super().__init__(f"unknown {what} {name!r:.200}: {hint}{listed}")


class Unsupported(SettingError):
    """These engines, or a worker process, do not support what was requested."""


class BufferTooSmall(SettingError):
    """The image has more bytes than the caller's buffer."""


class EnvironmentFault(SdruntimeError):
    """This machine lacks what the call needs."""

    exit_code = 3


class LibraryMissing(EnvironmentFault):
    """An engine library cannot be imported. The message contains the command that installs it."""


class DeviceMissing(EnvironmentFault):
    """The requested device is not available."""


class OutOfSpace(EnvironmentFault):
    """Memory or disk ran out."""


class BundleError(SdruntimeError):
    """A bundle does not match its manifest. `faults` has every fault."""

    exit_code = 5

    def __init__(self, where: object, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        count = f"{len(self.faults)} fault{'s' if len(self.faults) != 1 else ''}"
        super().__init__(f"{where}: {count}\n{lines_of(self.faults)}")


class EngineError(SdruntimeError):
    """No engine fits, or an engine does not support the call."""

    exit_code = 5


def plain(error: BaseException) -> str:
    """Return an error's text for a message that names the file itself: without an errno or the wording of Python's codecs."""
    if isinstance(error, UnicodeDecodeError):
        return f"not text in UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    return str(error)


def quoted(path: str | os.PathLike[str]) -> str:
    """Return a path quoted for a shell, for the commands in messages."""
    return shlex.quote(os.fspath(path))


def printable(text: str) -> str:
    """Return a text with its control characters escaped, which could move a terminal's cursor or hide lines."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)
