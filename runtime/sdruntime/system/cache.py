"""The user's cache: results that cost more to compute than to keep. It may be removed at any time."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path

from sdruntime.errors import plain
from sdruntime.system.durable import replace_file


def cache_folder() -> Path:
    """Return the folder of the cache, which may not exist: $SDRUNTIME_CACHE, or sdruntime in $XDG_CACHE_HOME or in ~/.cache."""
    own = os.environ.get("SDRUNTIME_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdruntime"


def read_cached(name: str) -> bytes | None:
    """Return the bytes stored under `name` (a path below the folder), or None if there are none."""
    with contextlib.suppress(OSError):
        return (cache_folder() / name).read_bytes()
    return None


def write_cached(name: str, data: bytes | memoryview) -> None:
    """Store `data` under `name` atomically: two processes may write at once. Warns if the folder cannot be written."""
    path = cache_folder() / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as error:
        warnings.warn(
            f"{path} cannot be written: {plain(error)}; set SDRUNTIME_CACHE to another folder", RuntimeWarning, stacklevel=2
        )
