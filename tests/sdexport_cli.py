"""The commands of sdexport, run in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from sdexport.cli import main


def run(*arguments: object) -> Result:
    """What a command prints and its exit code; it never ends with a traceback."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result
