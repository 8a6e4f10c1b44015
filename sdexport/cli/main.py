"""The command line: only this folder of sdexport prints or chooses an exit code.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 failed, 2 usage, 3 environment,
4 verification failed, 5 damaged bundle, 130 interrupted; each error class has its own.
"""

from __future__ import annotations

from typing import Any

import click

from sdexport import __version__
from sdexport.cli.bench import bench
from sdexport.cli.build import build
from sdexport.cli.engines import engines
from sdexport.cli.inspect import doctor, inspect
from sdexport.cli.merge import merge
from sdexport.cli.reporting import Commands, shared
from sdexport.cli.verify import verify


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sdexport")
@shared
def main(**_: Any) -> None:
    """Export Stable Diffusion checkpoints to bundles, which sdruntime runs without PyTorch."""


for command in (build, merge, engines, inspect, verify, bench, doctor):
    main.add_command(command)
