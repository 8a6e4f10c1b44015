"""What the files of the command line share: documents, notes, the line of progress, KEY=VALUE."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from sdruntime.errors import SettingError

SCHEMA = 1  # of every --json document


def pairs(texts: Sequence[str], example: str) -> Iterator[tuple[str, str]]:
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise SettingError(f"--option {text!r}: KEY=VALUE is the form, such as {example}")
        yield key, value


def document(**fields: Any) -> None:
    json.dump({"schema": SCHEMA, **fields}, sys.stdout, indent=1, allow_nan=False)
    print()


def note(message: str) -> None:
    print(message, file=sys.stderr)


def progress(what: str, done: int, total: int) -> None:
    """One line that is written over, where a person looks on."""
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{what} {done} of {total}" if total else f"\r\x1b[2K{what}", end="", file=sys.stderr, flush=True)


def clear_progress() -> None:
    if sys.stderr.isatty():
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
