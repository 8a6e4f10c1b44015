"""The command build: engines from a bundle's own ONNX."""

from __future__ import annotations

import argparse
import contextlib
import time
from typing import TYPE_CHECKING

from sdruntime.cli.terminal import Failed, document, pairs
from sdruntime.errors import SdruntimeError, SettingError

if TYPE_CHECKING:
    from sdruntime.engines.building import BuildRequest


def build(options: argparse.Namespace) -> None:
    """`sdruntime build`: build engines and check each against the reference outputs before it is added."""
    from sdruntime.engines.building import build_engines, rebuild_stale
    from sdruntime.verification.verify import held

    if options.stale == (options.backend is not None):
        raise SettingError("build: give --backend for new engines or --stale for old ones, and not both")
    if options.stale:
        refuse_beside_stale(options)
    if options.components and options.without:
        raise SettingError("build: give --component or --without, and not both")
    asked = asked_of(options) if options.backend else None
    check = None if options.no_verify else held
    reporter, done, begun = options.progress, [], time.monotonic()
    events = build_engines(options.bundle, asked, check=check) if asked else rebuild_stale(options.bundle, check=check)
    try:
        with contextlib.closing(events):
            for event in events:
                if event.state in ("begin", "stage"):
                    stage = event.stage
                    name, at, total = ("", 0, 0) if stage is None else (stage.name, stage.done, stage.total)
                    reporter.show(f"build {event.engine}", name, done=at, total=total)
                    continue
                for text in event.notes:
                    reporter.note(f"warning: {text}")
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
                    what = "already present" if event.state == "present" else f"{event.size:,} bytes in {event.seconds:.1f} s"
                    reporter.print(f"{event.engine}: {what}")
    except (SdruntimeError, OSError, MemoryError, KeyboardInterrupt) as error:
        raise Failed(error, engines=done) from error
    if options.json:
        document(engines=done, seconds=round(time.monotonic() - begun, 3))
    elif options.stale and not done:
        print("no engine is stale")


def refuse_beside_stale(options: argparse.Namespace) -> None:
    """Stale engines are built again as they were requested: what says otherwise would be ignored."""
    names = {"components": "--component"}
    for name in ("target", "size", "batch", "guidance", "components", "without", "option"):
        if getattr(options, name):
            raise SettingError(f"{names.get(name, f'--{name}')} cannot be used with --stale")


def asked_of(options: argparse.Namespace) -> BuildRequest:
    from sdruntime.engines.building import BuildRequest

    return BuildRequest(
        backend=options.backend,
        target=options.target,
        size=options.size,
        batch=options.batch,
        guidance=options.guidance,
        components=tuple(options.components),
        without=tuple(options.without),
        options=dict(pairs(options.option, "optimization_level=5")),
    )
