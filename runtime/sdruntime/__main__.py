"""The command line of sdruntime: run one command, report its error and return the exit code."""

from __future__ import annotations

import contextlib
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from sdruntime.cli.parser import parser
from sdruntime.cli.progress import progress_on
from sdruntime.cli.terminal import Failed, UsageError, code_of, document, failure, reason_of, standard_output, wants_json
from sdruntime.errors import SdruntimeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: success, 1: failed, 2: usage, 3: environment, 4: verification failed, 5: bundle or engine does not fit, 130: interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = wants_json(words)
    with standard_output():
        try:
            run(words)
            sys.stdout.flush()
        except BrokenPipeError:
            return 128 + signal.SIGPIPE
        except Failed as failed:
            return fail(failed.error, as_json, **failed.fields)
        except (KeyboardInterrupt, SdruntimeError, MemoryError, OSError) as error:
            return fail(error, as_json)
    return 0


def run(words: Sequence[str]) -> None:
    """Run one command. Raises its error."""
    try:
        options = parser().parse_args(words)
    except SystemExit:  # after --help and --version
        return
    with (
        progress_on(quiet=options.quiet or options.json) as options.progress,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_, **__: options.progress.note(f"warning: {message}")
        options.run(options)


def fail(error: BaseException, as_json: bool, **fields: Any) -> int:
    """Report an error, as text or as the document of --json, and return its exit code."""
    if isinstance(error, UsageError):
        print(error.usage, file=sys.stderr)
    reason = reason_of(error)
    print(reason if isinstance(error, KeyboardInterrupt) else f"error: {reason}", file=sys.stderr)
    if as_json:
        with contextlib.suppress(OSError):  # standard output itself may be what failed
            document(**fields, **failure(error))
            sys.stdout.flush()
    return code_of(error)


if __name__ == "__main__":
    sys.exit(main())
