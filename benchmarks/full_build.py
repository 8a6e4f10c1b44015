"""Measure a whole build of a full-size checkpoint with random weights: time and peak memory of each stage, and its silences.

    python -m benchmarks.full_build sdxl --folder DIR [--single-file] [--precision fp16] [--no-audit] [--no-verify] [--json FILE]

The checkpoint is written with float16 weights, all different (SDXL: 7 GB), unless DIR has it from an earlier run. The build runs
in this process, as `sdexport build` does. Memory is that of this process and its children together, sampled every 0.1 s. The
pages of mapped weight files count while they are resident, though the system may drop them: `private` does not count them. A
silence is the time between two events of progress. `processor seconds` is the time of all cores, which other work on the machine
changes less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.export_full_size import ROOT
from benchmarks.gpu.checkpoint import MODELS, write_checkpoint, write_single_file
from sdexport.build.events import ExportOptions, ExportProgress
from sdexport.build.export import build
from sdruntime.system.process import module_command

EVERY = 0.1  # seconds


@dataclass(slots=True)
class Span:
    """A stage of a component: seconds, peak memory in bytes, and the longest time without a new event."""

    name: str
    seconds: float = 0.0
    peak: int = 0
    private: int = 0
    silence: float = 0.0


class Memory:
    """The memory of a process and its descendants, sampled in a thread; `take` returns the peaks since the last call."""

    def __init__(self) -> None:
        self._peaks, self._lock, self._done = (0, 0), threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def take(self) -> tuple[int, int]:
        with self._lock:
            peaks, self._peaks = self._peaks, (0, 0)
        return peaks

    def _run(self) -> None:
        while not self._done.wait(EVERY):
            sizes = [_resident(process) for process in _family(os.getpid())]
            whole, private = (sum(each) for each in zip(*sizes, strict=True))
            with self._lock:
                self._peaks = max(self._peaks[0], whole), max(self._peaks[1], private)


def _family(parent: int) -> Iterator[int]:
    """Yield a process and its descendants."""
    yield parent
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from _family(int(child))


def _resident(process: int) -> tuple[int, int]:
    """Return the bytes of a process in memory, and of them those that no file backs."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{process}/statm").read_text().split()
    except (OSError, ValueError):
        return 0, 0
    page = os.sysconf("SC_PAGE_SIZE")
    return int(resident) * page, (int(resident) - int(shared)) * page


def measured(model: Path, out: Path, options: ExportOptions) -> dict[str, Any]:
    """Build the bundle and return the figures."""
    spans: list[Span] = []
    begun = last = time.perf_counter()
    processor = sum(os.times()[:4])
    with Memory() as memory:
        events = build(str(model), out, options)
        while True:
            try:
                event = next(events)
            except StopIteration as end:
                result = end.value
                break
            now = time.perf_counter()
            _account(spans, now - last, memory.take())
            last = now
            if isinstance(event, ExportProgress):
                name = f"{event.component}: {event.stage.name}"
                if not spans or spans[-1].name != name:
                    spans.append(Span(name))
                    print(f"{now - begun:8.1f} s  {name}", file=sys.stderr, flush=True)
        now = time.perf_counter()
        _account(spans, now - last, memory.take())
    return {
        "seconds": round(now - begun, 1),
        "processor seconds": round(sum(os.times()[:4]) - processor, 1),
        "peak": max(span.peak for span in spans),
        "private": max(span.private for span in spans),
        "largest process": result.peak,
        "written": result.written,
        "checks": result.checks,
        "longest silence": round(max(span.silence for span in spans), 1),
        "stages": [asdict(span) | {"seconds": round(span.seconds, 1), "silence": round(span.silence, 1)} for span in spans],
    }


def _account(spans: list[Span], seconds: float, peaks: tuple[int, int]) -> None:
    if spans:
        span = spans[-1]
        span.seconds += seconds
        span.silence = max(span.silence, seconds)
        span.peak, span.private = max(span.peak, peaks[0]), max(span.private, peaks[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--folder", type=Path, required=True, help="where to write the checkpoint and the bundle")
    parser.add_argument("--single-file", action="store_true", help="the original layout in one file, not a diffusers folder")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp16")
    parser.add_argument("--no-audit", action="store_true")
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--write-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    kind = "file" if options.single_file else "folder"
    place = options.folder / f"{options.model}-{kind}"
    checkpoint = place / f"{options.model}.safetensors" if options.single_file else place
    if options.write_only:
        (write_single_file if options.single_file else write_checkpoint)(place, options.model)
        return
    if not place.exists():  # in its own process, which releases torch's memory
        again = module_command("benchmarks.full_build", *sys.argv[1:], "--write-only")
        subprocess.run(again, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    bundle = options.folder / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    asked = ExportOptions(precision=options.precision, audit=not options.no_audit, verify=not options.no_verify)
    document = {
        "model": options.model,
        "source": kind,
        "precision": options.precision,
        "audit": asked.audited,
        "verify": asked.verify,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        **measured(checkpoint, bundle, asked),
    }
    print(json.dumps(document, indent=1))
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
