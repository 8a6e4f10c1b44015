"""Temporary names that carry their owner, so that leftovers of killed processes can be removed, and nothing else.

A temporary file or folder is named PREFIX + token. The token names the process (id, start time, boot, pid namespace, host), so
that another process can find out whether it still runs. A folder is also locked (`flock`) while its owner lives: where the token
alone cannot tell, as between two containers, the lock does.
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
    """A process. Where the system cannot tell (no /proc), `start` is 0 and `boot` and `space` are those of no system."""

    pid: int
    start: int  # clock ticks after the boot
    boot: str
    space: int  # the pid namespace
    host: str

    @classmethod
    def here(cls) -> Owner:
        return cls(os.getpid(), started(os.getpid()) or 0, *_system())

    @classmethod
    def parse(cls, token: str) -> Owner | None:
        """The owner that `token` names, None if it is not a token."""
        found = _TOKEN.fullmatch(token)
        return found and cls(int(found[1]), int(found[2]), found[3], int(found[4]), found[5])

    def token(self) -> str:
        """A new name of this owner's: no two are alike."""
        return f"{self.pid}-{self.start}-{self.boot}-{self.space}-{self.host}-{secrets.token_hex(4)}"

    def gone(self) -> bool | None:
        """Whether the process has ended; None if that cannot be known here (another host, another container)."""
        boot, space, host = _system()
        if self.boot != boot:
            return True if self.host == host else None  # this host has been restarted since
        if self.space != space:
            return None
        begun = started(self.pid)
        return begun is None or begun not in (0, self.start)


@contextlib.contextmanager
def owned_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent` that is this process's: removed with all that it holds at the end of the block."""
    while True:
        path = parent / f"{prefix}{Owner.here().token()}"
        path.mkdir()
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(path, _FOLDER)
            if hold(handle) is not False and leads_to(path, handle):
                break
            os.close(handle)  # taken for a leftover before it was locked
    try:
        yield path
    finally:
        try:
            remove_tree(path)
        finally:
            os.close(handle)


def sweep(parent: Path, prefix: str) -> None:
    """Remove the files and folders of `parent` named `prefix` + token whose owners are gone."""
    for path in leftovers(parent, prefix):
        remove_tree(path)


def leftovers(parent: Path, prefix: str) -> list[Path]:
    """The files and folders of `parent` named `prefix` + token whose owners are gone."""
    return [path for path in _named(parent, prefix) if abandoned(path, path.name.removeprefix(prefix))]


def in_use(parent: Path, prefix: str) -> list[Path]:
    """The files and folders of `parent` named `prefix` + token whose owners may still live."""
    return [path for path in _named(parent, prefix) if not abandoned(path, path.name.removeprefix(prefix))]


def abandoned(path: Path, token: str) -> bool:
    """Whether the owner of `path` is gone. One that cannot be known counts as gone after a day without a change. False for a name
    that is not a token."""
    owner = Owner.parse(token)
    if owner is None:
        return False
    if (gone := owner.gone()) is not None:
        return gone
    try:
        status = path.lstat()
        if owner.boot == Owner.here().boot and path.is_dir():  # same kernel: its locks tell
            handle = os.open(path, _FOLDER)
            try:
                taken = hold(handle)
                if taken is False or (taken and excludes(handle)):
                    return bool(taken)
            finally:
                os.close(handle)
    except OSError:
        return False
    return time.time() - status.st_mtime > _DAY


def remove_tree(path: Path) -> None:
    """Remove a file or a folder with all that it holds; links are never followed. What cannot be removed is a warning."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        if path.exists():  # another process removes it too
            remove_tree(path)
    except OSError as error:
        warnings.warn(f"{path}: left behind, it cannot be removed: {plain(error)}", RuntimeWarning, stacklevel=2)


def hold(handle: int) -> bool | None:
    """Lock an open folder until it is closed. False: another holds it; None: this file system has no such locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def excludes(handle: int) -> bool:
    """Whether the lock on a folder, which is held, keeps others out: some file systems only say yes."""
    other = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=handle)
    try:
        return hold(other) is False
    finally:
        os.close(other)


def names_in(folder: Path | int) -> list[str]:
    """The names in a folder, or in one that is open."""
    with os.scandir(folder) as found:
        return sorted(entry.name for entry in found)


def _named(parent: Path, prefix: str) -> list[Path]:
    try:
        return [parent / name for name in names_in(parent) if name.startswith(prefix)]
    except (FileNotFoundError, PermissionError):
        return []


def started(pid: int) -> int | None:
    """When a process started, in clock ticks after the boot (0 if unknown); None if it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:  # no /proc, or one that hides other users' processes
        return 0 if _runs(pid) else None
    if fields[0] in "ZX" and int(fields[17]) <= 1:  # ended, and waits for its parent to notice; its threads may live on
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
    """This boot, pid namespace and host."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        boot = "0" * 8
    try:
        space = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        space = 0
    return boot, space, hashlib.sha256(platform.node().encode()).hexdigest()[:8]
