"""The command capi."""

from __future__ import annotations

import argparse

from sdruntime.capi import answers
from sdruntime.command import document


def capi(options: argparse.Namespace) -> None:
    found = answers(options)
    if options.json:
        document(**found)
    else:
        print("\n".join(found.values()))
