"""What the files of the command line share: errors as messages and exit codes, and documents. They alone print or exit."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import click

from sdexport.errors import SdexportError
from sdruntime.errors import SdruntimeError

SCHEMA = 1
INTERRUPTED = 130


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a command raises into a message and an exit code."""

    @functools.wraps(command)
    def reporting(**options: Any) -> None:
        try:
            command(**options)
            sys.stdout.flush()
        except KeyboardInterrupt:
            fail("interrupted", INTERRUPTED)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer has no reader
            sys.exit(128 + signal.SIGPIPE)
        except (SdexportError, SdruntimeError, MemoryError, OSError) as error:
            fail(f"error: {told(error)}", code_of(error))

    return reporting


def told(error: Exception) -> str:
    return "out of memory: free some, or export on a larger machine" if isinstance(error, MemoryError) else str(error)


def code_of(error: Exception) -> int:
    return error.exit_code if isinstance(error, (SdexportError, SdruntimeError)) else 3


as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")


def document(**fields: Any) -> None:
    click.echo(json.dumps({"schema": SCHEMA, **fields}, indent=1, allow_nan=False))


def fail(message: str, code: int) -> None:
    click.echo(message, err=True)
    sys.exit(code)
