"""Shared parts of the commands: their parser, JSON documents, failures, KEY=VALUE options and output files."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from sdruntime.errors import SettingError, UnknownName, plain, printable, quoted

SCHEMA = 1  # of every --json document
INTERRUPTED = 130
_STANDARD_OUTPUT = "standard output"
# Options of other programs, and ours for the same setting.
ELSEWHERE = {
    "width": "--size WxH",
    "height": "--size WxH",
    "cfg-scale": "--guidance",
    "guidance-scale": "--guidance",
    "scale": "--guidance",
    "guidance-rescale": "--rescale",
    "num-inference-steps": "--steps",
    "num-images-per-prompt": "--count",
    "negative-prompt": "--negative",
    "denoising-strength": "--strength",
    "init-image": "--image",
    "scheduler": "--sampler",
    "eta": "--option eta=0.5",
}


class UsageError(SettingError):
    """The arguments are wrong. `usage`: the usage text of the command."""

    def __init__(self, message: str, usage: str) -> None:
        super().__init__(message)
        self.usage = usage


class Failed(Exception):
    """A command failed with `error`. `fields`: further fields of its --json document."""

    def __init__(self, error: BaseException, **fields: Any) -> None:
        super().__init__(str(error))
        self.error, self.fields = error, fields


class Parser(argparse.ArgumentParser):
    """A parser without abbreviated options. Raises UsageError, with suggestions for an unknown option."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = super().parse_known_args(args, namespace)
        for argument in unknown:
            if argument.startswith("-") and argument != "-":
                name = argument.partition("=")[0]
                ours = ELSEWHERE.get(name.lstrip("-").replace("_", "-"), "")
                if ours.partition(" ")[0] in self._option_string_actions:
                    self.error(f"unknown option of {self.prog} {name!r}: write {ours}")
                try:
                    raise UnknownName(f"option of {self.prog}", name, self._option_string_actions)
                except UnknownName as error:
                    self.error(str(error))
        return options, unknown

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print the help or the version. argparse ignores a write that fails."""
        print(message, end="", file=file or sys.stderr)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.format_usage().rstrip())


@contextlib.contextmanager
def standard_output() -> Iterator[None]:
    """In this context, an error of standard output names it, and what it cannot encode is escaped, as on standard error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may contain any character
    with contextlib.redirect_stdout(cast(TextIO, _Output(sys.stdout))):
        try:
            yield
        finally:
            try:
                sys.stdout.flush()
            except OSError:  # or the interpreter would fail with it when it exits
                with contextlib.suppress(OSError):  # a stream in memory has no descriptor
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Output:
    """A stream for standard output, whose errors have its name."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream  # None if the process was started without standard output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def buffer(self) -> _Output:
        return _Output(self._stream.buffer)

    def write(self, data: str | bytes) -> int:
        if self._stream is None:
            raise OSError(errno.EBADF, "it is closed", _STANDARD_OUTPUT)
        with self._named():
            return int(self._stream.write(data))

    def flush(self) -> None:
        if self._stream is not None:
            with self._named():
                self._stream.flush()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = _STANDARD_OUTPUT
            raise


def wants_json(arguments: Sequence[str]) -> bool:
    """Return whether --json is among the arguments, which may be wrong otherwise."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in own


def pairs(texts: Sequence[str], example: str, option: str = "--option") -> Iterator[tuple[str, str]]:
    """Yield (key, value) of each KEY=VALUE text. Raises SettingError for another form, or two values of a key."""
    values: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise SettingError(f"{option} {text!r}: expected KEY=VALUE, such as {example}")
        if values.setdefault(key, value) != value:
            raise SettingError(f"{option} {key} was given twice, as {values[key]} and {value}: give one of them")
        yield key, value


def check_output(path: Path, option: str) -> None:
    """Check that a file can be written at `path`, before the work whose result it will hold. Raises SettingError."""
    folder = path.parent
    if path.is_dir():
        raise SettingError(f"{option} {path}: this is a folder: name a file in it")
    if not folder.is_dir():
        fault = "is not a folder" if folder.exists() else "does not exist"
        raise SettingError(f"{option} {path}: the folder {folder} {fault}: mkdir -p {quoted(folder)}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise SettingError(f"{option} {path}: no permission to write there")


def document(**fields: Any) -> None:
    """Print a --json document."""
    json.dump({"schema": SCHEMA, **fields}, sys.stdout, indent=1, allow_nan=False)
    print()


def failure(error: BaseException) -> dict[str, Any]:
    """Return the fields of a --json document for an error: its name, exit code and reason; `faults` if it has several."""
    fields: dict[str, Any] = {"error": type(error).__name__, "code": code_of(error), "reason": reason_of(error)}
    if faults := getattr(error, "faults", ()):
        fields["faults"] = list(faults)
    return fields


def code_of(error: BaseException) -> int:
    """Return the exit code for an error."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, MemoryError):
        return 3
    code = getattr(error, "exit_code", 1)  # sdexport's errors have it too
    return code if isinstance(code, int) else 1


def reason_of(error: BaseException) -> str:
    """Return the text of an error, with the names of its files."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, MemoryError):
        return "out of memory: free some, or request a smaller size or count"
    names = [str(name) for name in (error.filename, error.filename2) if name is not None] if isinstance(error, OSError) else []
    return printable(": ".join([*names, plain(error)]))
