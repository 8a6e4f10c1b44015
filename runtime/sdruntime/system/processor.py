"""The processor of this machine: its name, a fingerprint for caches, its usable cores, its load."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from pathlib import Path


def name() -> str:
    """Return the processor's model, such as "AMD EPYC 7763 64-Core Processor"."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def fingerprint() -> str:
    """Return the processor's model, features and usable cores. Timings apply only to processors with the same fingerprint."""
    keys = ("model name", "flags", "CPU implementer", "CPU part", "Features")  # the last three on ARM
    described = _cpuinfo()
    model = " ".join(described[key] for key in keys if key in described) or platform.processor() or platform.machine()
    return f"{model} x{cores()}"


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy(seconds: float) -> float | None:
    """Sleep for `seconds` and return the fraction of all cores that other processes used, 0 to 1, or None if the system does not
    report it (/proc/stat)."""
    before = _ticks()
    time.sleep(seconds)
    after = _ticks()
    if before is None or after is None:
        return None
    idle, total = (end - begin for begin, end in zip(before, after, strict=True))
    return round(1 - idle / total, 3) if total > 0 else None


def _ticks() -> tuple[int, int] | None:
    """Return the idle and the total time of all cores since the system started, in clock ticks (proc(5))."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    except OSError:
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, first.split()[1:9])
    return idle + iowait, user + nice + system + idle + iowait + irq + softirq + steal


def _cpuinfo() -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo, or nothing if there is no such file."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    return fields
