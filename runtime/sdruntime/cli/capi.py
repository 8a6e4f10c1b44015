"""The command capi."""

from __future__ import annotations

import argparse

from sdruntime.cli.terminal import document
from sdruntime.serving.capi import answers


def capi(options: argparse.Namespace) -> None:
    found = answers(options)
    if options.json:
        document(**found)
    else:
        print("\n".join(found.values()))
