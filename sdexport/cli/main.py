"""The command line: the only file of sdexport that prints or picks an exit code.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 failed, 2 usage, 3 environment,
4 numbers that do not hold, 5 a bundle that is not whole, 130 interrupted; the errors carry them.
"""

from __future__ import annotations

from typing import Any

import click

from sdexport import __version__
from sdexport.cli.bench import bench
from sdexport.cli.build import build
from sdexport.cli.engines import engines
from sdexport.cli.inspect import doctor, inspect
from sdexport.cli.reporting import Commands, shared
from sdexport.cli.verify import verify


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sdexport")
@shared
def main(**_: Any) -> None:
    """Export Stable Diffusion checkpoints to bundles, which sdruntime runs without PyTorch."""


for command in (build, engines, inspect, verify, bench, doctor):
    main.add_command(command)
