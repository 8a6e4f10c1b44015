"""The memory of this machine and of this process."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path


def available_memory() -> int:
    """Return the bytes of system memory available without swapping (MemAvailable); 0 if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


def return_freed_memory() -> None:
    """Return freed memory to the system. glibc keeps blocks of up to 32 MB, the size of many weights. No effect elsewhere."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
