"""The commands `inspect` and `doctor`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sdruntime.cli.terminal import document
from sdruntime.errors import printable, quoted

if TYPE_CHECKING:
    from sdruntime.bundle.bundle import Bundle
    from sdruntime.engines.choose import Machine


def inspect(options: argparse.Namespace) -> None:
    """Run `sdruntime inspect`."""
    from sdruntime.bundle.bundle import Bundle, opening
    from sdruntime.cli.describe import bundle_document, bundle_lines
    from sdruntime.engines.choose import Machine

    bundle = opening(options.bundle, Bundle.checked) if options.check else Bundle.open(options.bundle)
    machine = Machine.here()
    if options.stale:
        inspect_stale(bundle, machine, as_json=options.json)
        return
    if options.json:
        document(**bundle_document(bundle, machine))
        return
    for line in bundle_lines(bundle, machine):
        print(printable(line))


def inspect_stale(bundle: Bundle, machine: Machine, *, as_json: bool) -> None:
    """List the stale engines, and how to rebuild them."""
    from sdruntime.engines.building import stale_engines
    from sdruntime.engines.choose import misfit

    reasons = {engine.name: misfit(engine, machine) for engine in stale_engines(bundle)}
    if as_json:
        document(stale=[{"engine": name, "reason": reason} for name, reason in reasons.items()])
        return
    for name, reason in reasons.items():
        print(printable(f"{name}: {reason}"))
    print(f"rebuild them: sdruntime build {quoted(bundle.folder)} --stale" if reasons else "no engine is stale")


def doctor(options: argparse.Namespace) -> None:
    """Run `sdruntime doctor`."""
    from sdruntime.bundle.bundle import Bundle
    from sdruntime.cli.describe import bundle_document, bundle_lines, machine_document, machine_lines
    from sdruntime.engines.choose import Machine

    machine = Machine.here()
    bundle = Bundle.open(options.bundle) if options.bundle else None
    description = machine_document(machine)
    if options.json:
        document(**description, bundle=bundle and bundle_document(bundle, machine))
        return
    for line in machine_lines(description):
        print(line)
    for line in bundle_lines(bundle, machine) if bundle else ():
        print(printable(line))
