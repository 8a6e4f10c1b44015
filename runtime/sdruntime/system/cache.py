"""The user's cache: what is cheaper to keep than to make again, and may be removed at any time."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path

from sdruntime.errors import plain
from sdruntime.system.durable import replace_file


def cache_folder() -> Path:
    """$SDRUNTIME_CACHE, or sdruntime in $XDG_CACHE_HOME, or in ~/.cache. It need not exist."""
    own = os.environ.get("SDRUNTIME_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdruntime"


def read_cached(name: str) -> bytes | None:
    """What was kept under `name` (a path below the folder); None where there is nothing."""
    with contextlib.suppress(OSError):
        return (cache_folder() / name).read_bytes()
    return None


def write_cached(name: str, data: bytes | memoryview) -> None:
    """Keep `data` under `name`, by one rename: two processes may write at once. A folder that cannot be written is a warning."""
    path = cache_folder() / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as error:
        warnings.warn(
            f"{path} could not be kept: {plain(error)}; SDRUNTIME_CACHE names another folder", RuntimeWarning, stacklevel=2
        )
