"""Temporary names that identify their owner, so that the leftovers of killed processes, and nothing else, can be removed.

A temporary file or folder is named PREFIX + token. The token identifies the process (id, start time, boot, pid namespace, host),
so that another process can find out whether it still runs. A folder is also locked (`flock`) while its owner runs: the lock
decides where the token is not enough, as between two containers.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import platform
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdruntime.errors import plain
from sdruntime.system.files import leads_to

_TOKEN = re.compile(r"(\d+)-(\d+)-([0-9a-f]{8})-(\d+)-([0-9a-f]{8})-[0-9a-f]{8}")
_DAY = 86_400  # seconds
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True)
class Owner:
    """A process. Without /proc, `start` and `space` are 0 and `boot` is all zeros."""

    pid: int
    start: int  # clock ticks after the boot
    boot: str
    space: int  # the pid namespace
    host: str

    @classmethod
    def here(cls) -> Owner:
        """Return this process."""
        return cls(os.getpid(), started(os.getpid()) or 0, *_system())

    @classmethod
    def parse(cls, token: str) -> Owner | None:
        """Return the owner that `token` identifies, or None if it is not a token."""
        match = _TOKEN.fullmatch(token)
        return match and cls(int(match[1]), int(match[2]), match[3], int(match[4]), match[5])

    def token(self) -> str:
        """Return a new unique token of this owner."""
        return f"{self.pid}-{self.start}-{self.boot}-{self.space}-{self.host}-{secrets.token_hex(4)}"

    def gone(self) -> bool | None:
        """Return whether the process has ended, or None if that cannot be known (another host, another container)."""
        boot, space, host = _system()
        if self.boot != boot:
            return True if self.host == host else None  # the same host has restarted since
        if self.space != space:
            return None
        begun = started(self.pid)
        return begun is None or begun not in (0, self.start)


@contextlib.contextmanager
def owned_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Create a folder in `parent`, owned by this process and removed with its contents at the end of the block."""
    while True:
        path = parent / f"{prefix}{Owner.here().token()}"
        path.mkdir()
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(path, _FOLDER)
            if hold(handle) is not False and leads_to(path, handle):
                break
            os.close(handle)  # another process removed it as a leftover before it was locked
    try:
        yield path
    finally:
        try:
            remove_tree(path)
        finally:
            os.close(handle)


def sweep(parent: Path, prefix: str) -> None:
    """Remove the files and folders in `parent` named `prefix` + token whose owners have ended."""
    for path in leftovers(parent, prefix):
        remove_tree(path)


def leftovers(parent: Path, prefix: str) -> list[Path]:
    """Return the files and folders in `parent` named `prefix` + token whose owners have ended."""
    return [path for path in _named(parent, prefix) if abandoned(path, path.name.removeprefix(prefix))]


def in_use(parent: Path, prefix: str) -> list[Path]:
    """Return the files and folders in `parent` named `prefix` + token whose owners may still run."""
    return [path for path in _named(parent, prefix) if not abandoned(path, path.name.removeprefix(prefix))]


def abandoned(path: Path, token: str) -> bool:
    """Return whether the owner of `path` has ended; False if `token` is not a token.

    An owner whose state cannot be known counts as ended after a day without a change.
    """
    owner = Owner.parse(token)
    if owner is None:
        return False
    if (gone := owner.gone()) is not None:
        return gone
    try:
        status = path.lstat()
        if owner.boot == Owner.here().boot and path.is_dir():  # same kernel: its locks are reliable
            handle = os.open(path, _FOLDER)
            try:
                locked = hold(handle)
                if locked is False or (locked and excludes(handle)):
                    return bool(locked)
            finally:
                os.close(handle)
    except OSError:
        return False
    return time.time() - status.st_mtime > _DAY


def remove_tree(path: Path) -> None:
    """Remove a file, or a folder with its contents. Links are never followed. Warns if something cannot be removed."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        if path.exists():  # another process is removing it too
            remove_tree(path)
    except OSError as error:
        warnings.warn(f"{path}: cannot be removed: {plain(error)}", RuntimeWarning, stacklevel=2)


def hold(handle: int) -> bool | None:
    """Lock an open folder until it is closed. Return False if another process holds the lock, None without support for locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def excludes(handle: int) -> bool:
    """Return whether the lock that is held on a folder excludes others: some file systems grant every lock."""
    other = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=handle)
    try:
        return hold(other) is False
    finally:
        os.close(other)


def names_in(folder: Path | int) -> list[str]:
    """Return the sorted names in a folder, given as a path or a descriptor."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries)


def _named(parent: Path, prefix: str) -> list[Path]:
    try:
        return [parent / name for name in names_in(parent) if name.startswith(prefix)]
    except (FileNotFoundError, PermissionError):
        return []


def started(pid: int) -> int | None:
    """Return when a process started, in clock ticks after the boot (0 if unknown), or None if it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:  # no /proc, or one that hides other users' processes
        return 0 if _runs(pid) else None
    if fields[0] in "ZX" and int(fields[17]) <= 1:  # a zombie, unless its other threads still run
        return None
    return int(fields[19])


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@functools.cache
def _system() -> tuple[str, int, str]:
    """Return the identifiers of this boot, pid namespace and host."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        boot = "0" * 8
    try:
        space = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        space = 0
    return boot, space, hashlib.sha256(platform.node().encode()).hexdigest()[:8]
