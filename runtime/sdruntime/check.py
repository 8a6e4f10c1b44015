"""The commands that hold a bundle to its golden numbers: build, which adds engines, and verify."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from sdruntime.command import clear_progress, document, note, pairs, progress
from sdruntime.errors import SettingError

if TYPE_CHECKING:
    from sdruntime.build import Asked


def build(options: argparse.Namespace) -> None:
    """`sdruntime build`: engines, each held to the golden numbers before it is added."""
    from sdruntime.build import build_engines, rebuild_stale
    from sdruntime.verify import held

    if options.stale == (options.backend is not None):
        raise SettingError("build: give --backend for new engines or --stale for old ones, and not both")
    asked = asked_of(options) if options.backend else None
    check = None if options.no_verify else held
    done, begun = [], time.monotonic()
    for event in build_engines(options.bundle, asked, check=check) if asked else rebuild_stale(options.bundle, check=check):
        if event.state == "stage" and event.stage is not None:
            progress(f"{event.component}: {event.stage.name}", event.stage.done, event.stage.total)
            continue
        clear_progress()
        if event.state == "begin":
            note(f"building {event.engine}")
            continue
        for text in event.notes:
            note(f"warning: {text}")
        done.append(
            {
                "component": event.component,
                "engine": event.engine,
                "state": event.state,
                "bytes": event.size,
                "seconds": round(event.seconds, 3),
                "peak_memory": event.peak,
                "notes": list(event.notes),
            }
        )
        if not options.json:
            what = "there already" if event.state == "present" else f"{event.size:,} bytes in {event.seconds:.1f} s"
            print(f"{event.engine}: {what}")
    if options.json:
        document(engines=done, seconds=round(time.monotonic() - begun, 3))
    elif options.stale and not done:
        print("no engine is stale")


def asked_of(options: argparse.Namespace) -> Asked:
    from sdruntime.build import Asked

    return Asked(
        backend=options.backend,
        target=options.target,
        size=options.size,
        batch=options.batch,
        guidance=options.guidance,
        components=tuple(options.components),
        without=tuple(options.without),
        options=dict(pairs(options.option, "optimization_level=5")),
    )


def verify(options: argparse.Namespace) -> None:
    """`sdruntime verify`."""
    from sdruntime.bundle import Bundle
    from sdruntime.engine import EngineOptions
    from sdruntime.errors import VerificationFailed
    from sdruntime.report import write_page
    from sdruntime.verify import report_of
    from sdruntime.verify import verify as checks

    bundle = Bundle.open(options.bundle)
    report = report_of(bundle, checks(bundle, options=EngineOptions(device=options.device, threads=options.threads)))
    if options.html:
        write_page(report, options.html)
    if options.json:
        document(**report.document())
    else:
        print("\n".join(report.lines()))
    if not report.passed:
        raise VerificationFailed(bundle.folder, report.faults())
