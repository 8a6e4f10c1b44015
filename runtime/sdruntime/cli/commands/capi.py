"""The command `capi`: build the C library, and print the compiler options for it."""

from __future__ import annotations

import argparse

from sdruntime.cli.terminal import document
from sdruntime.serving.capi import selected_lines


def capi(options: argparse.Namespace) -> None:
    lines = selected_lines(options)
    if options.json:
        document(**lines)
    else:
        print("\n".join(lines.values()))
