"""How many files a process has open: a leak is a number that grows."""

from __future__ import annotations

import gc
import os
from pathlib import Path


def open_files(process: int | None = None) -> int:
    """Count the descriptors of a process, this one if None; 0 where the system does not list them.

    Garbage is collected first: it may be closed at any moment, so that an earlier count would be too high.
    """
    if process in (None, os.getpid()):
        gc.collect()
    folder = Path(f"/proc/{process or 'self'}/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


def open_links(path: Path) -> list[str]:
    """Return the descriptors of this process that lead to `path`, on Linux."""
    return [
        each.name
        for each in Path("/proc/self/fd").iterdir()
        if each.is_symlink() and os.path.realpath(each) == str(path.resolve())
    ]
