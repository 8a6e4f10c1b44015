"""The commands of sdexport, run in this process."""

from __future__ import annotations

import inspect

from click.testing import CliRunner, Result

from sdexport.cli.main import main

# click before 8.2 mixes stderr into stdout unless told not to
APART = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}


def run(*arguments: object) -> Result:
    """What a command prints and its exit code; it never ends with a traceback."""
    result = CliRunner(**APART).invoke(main, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result
