"""The command `build`: engines from a bundle's own ONNX."""

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
    """Run `sdruntime build`: build engines, and check each against the reference outputs before it is added."""
    from sdruntime.engines.building import build_engines, rebuild_stale
    from sdruntime.verification.verify import check_engine

    if options.stale == (options.backend is not None):
        raise SettingError("build: give --backend to build new engines or --stale to rebuild old ones, not both")
    if options.stale:
        check_stale_options(options)
    if options.components and options.without:
        raise SettingError("build: give --component or --without, not both")
    request = request_of(options) if options.backend else None
    check = None if options.no_verify else check_engine
    reporter, done, begun = options.progress, [], time.monotonic()
    events = build_engines(options.bundle, request, check=check) if request else rebuild_stale(options.bundle, check=check)
    try:
        with contextlib.closing(events):
            for event in events:
                if event.state in ("begin", "stage"):
                    stage = event.stage
                    name, count, total = ("", 0, 0) if stage is None else (stage.name, stage.done, stage.total)
                    reporter.show(f"build {event.engine}", name, done=count, total=total)
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
                    result = "already present" if event.state == "present" else f"{event.size:,} bytes in {event.seconds:.1f} s"
                    reporter.print(f"{event.engine}: {result}")
    except (SdruntimeError, OSError, MemoryError, KeyboardInterrupt) as error:
        raise Failed(error, engines=done) from error
    if options.json:
        document(engines=done, seconds=round(time.monotonic() - begun, 3))
    elif options.stale and not done:
        print("no engine is stale")


def check_stale_options(options: argparse.Namespace) -> None:
    """Check that no option that changes a build is combined with --stale, which rebuilds engines with their own settings."""
    names = {"components": "--component"}
    for name in ("target", "size", "batch", "guidance", "chunks", "components", "without", "option"):
        if getattr(options, name):
            raise SettingError(f"{names.get(name, f'--{name}')} cannot be used with --stale")


def request_of(options: argparse.Namespace) -> BuildRequest:
    """Return the build request of the command's options."""
    from sdruntime.engines.building import BuildRequest

    return BuildRequest(
        backend=options.backend,
        target=options.target,
        size=options.size,
        batch=options.batch,
        guidance=options.guidance,
        chunks=options.chunks,
        components=tuple(options.components),
        without=tuple(options.without),
        options=dict(pairs(options.option, "optimization_level=5")),
    )
