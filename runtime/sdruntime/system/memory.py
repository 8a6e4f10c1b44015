"""The memory of this machine."""

from __future__ import annotations

from pathlib import Path


def available_memory() -> int:
    """Return the bytes of system memory available without swapping (MemAvailable); 0 if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)
