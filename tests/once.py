"""What a session of tests makes once, whichever of its processes asks first (`pytest -n 2`)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# of the session: one for all of its processes
SESSION = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """No other process is in such a block of the same path meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def shared(factory: pytest.TempPathFactory) -> Path:
    """A folder of the session that all of its processes have."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The path `name` in the session's folder; the first process that asks makes it with `make(path)`."""
    path = shared(factory) / name
    made = path.with_name(f".{path.name}.made")
    with alone(path):
        if not made.exists():
            if path.exists():  # of a process that failed
                shutil.rmtree(path)
            make(path)
            made.touch()
    return path
