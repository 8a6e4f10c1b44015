"""Files below a folder that is opened once: links are not followed, and only regular files are opened.

Files are opened relative to the folder's descriptor, so a folder that takes its name later is never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 1 << 24
_TICK = 20_000_000  # ns; the kernel's clock for timestamps ticks every 1 to 10 ms
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class FileFault(Exception):
    """A file is missing or must not be read. The message begins with the file's path in its folder."""


class FileMissing(FileFault):
    """A file does not exist."""


class Folder:
    """An open folder, closed when the object is deleted. Raises FileFault if it cannot be opened."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self._descriptor = os.open(path, _FOLDER)
        except OSError as error:
            raise FileFault(f"{path}: {os.strerror(error.errno or 0)}") from error
        except ValueError as error:  # a NUL, or a lone surrogate
            raise FileFault(f"{str(path)!a}: not a valid path") from error
        weakref.finalize(self, os.close, self._descriptor)

    def status(self, path: str) -> os.stat_result:
        """Return the status of the regular file at `path`. Raises FileFault for anything else, and for a link in the path."""
        with self._parent(path) as (parent, name):
            return _regular(path, os.stat(name, dir_fd=parent, follow_symlinks=False))

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[int]:
        """Yield a descriptor for reading the regular file at `path`. Raises FileFault as `status` does."""
        with self._parent(path) as (parent, name):
            # a FIFO or a device is not opened; O_NONBLOCK is for one that takes the file's place after this check
            _regular(path, os.stat(name, dir_fd=parent, follow_symlinks=False))
            descriptor = os.open(name, _FILE, dir_fd=parent)
        try:
            _regular(path, os.fstat(descriptor))
            yield descriptor
        finally:
            os.close(descriptor)

    def read(self, path: str, *, most: int | None = None) -> bytes:
        """Return the bytes of the regular file at `path`. Raises FileFault, also for more than `most` bytes."""
        with self.open(path) as descriptor:
            size = os.fstat(descriptor).st_size
            if most is not None and size > most:
                raise FileFault(f"{path}: {size:,} bytes; at most {most:,} are read")
            try:
                return read_all(descriptor, size)
            except OSError as error:
                raise FileFault(f"{path}: {os.strerror(error.errno or 0)}") from error

    def in_place(self) -> bool:
        """Return whether the path still leads to this folder."""
        return leads_to(self.path, self._descriptor)

    @contextlib.contextmanager
    def _parent(self, path: str) -> Iterator[tuple[int, str]]:
        """Yield the descriptor of the folder that holds `path`, and the last part of `path`."""
        *folders, name = path.split("/")
        with contextlib.ExitStack() as stack:
            at = self._descriptor
            try:
                for depth, folder in enumerate(folders, 1):
                    if stat.S_ISLNK(os.stat(folder, dir_fd=at, follow_symlinks=False).st_mode):
                        raise FileFault(f"{path}: {'/'.join(folders[:depth])} is a link")
                    at = os.open(folder, _FOLDER | os.O_NOFOLLOW, dir_fd=at)
                    stack.callback(os.close, at)
                yield at, name
            except FileNotFoundError:
                raise FileMissing(f"{path}: missing") from None
            except OSError as error:
                raise FileFault(f"{path}: {os.strerror(error.errno or 0)}") from error


def _regular(path: str, status: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(status.st_mode):
        raise FileFault(f"{path}: not a regular file")
    return status


def leads_to(path: Path, descriptor: int) -> bool:
    """Return whether `path` leads to this open file or folder."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def read_all(descriptor: int, size: int) -> bytes:
    """Return the first `size` bytes of an open file, fewer if it is shorter."""
    with open(descriptor, "rb", closefd=False) as file:
        return file.read(size)


def hash_of(descriptor: int, stopped: Callable[[], bool] = lambda: False) -> str:
    """Return the SHA-256 of an open file, in hexadecimal. Stops early once `stopped`, called before each piece, is true."""
    digest, at = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_CHUNK))
    while not stopped() and (count := os.preadv(descriptor, [buffer], at)):
        digest.update(buffer[:count])
        at += count
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Stamp:
    """The part of an open file's status that changes when the file is written.

    A write within a tick of the kernel's clock may leave the times unchanged, so a stamp is only taken once the file has been
    unchanged for a tick. Adding or removing a hard link also changes the ctime; `links` distinguishes that from a write.
    """

    size: int
    written: int  # ns
    changed: int  # ns
    links: int

    @classmethod
    def of(cls, descriptor: int) -> Stamp:
        while True:
            status = os.fstat(descriptor)
            if not 0 <= time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < _TICK:
                return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_nlink)
            time.sleep(_TICK / 1e9)

    def holds(self, descriptor: int) -> bool:
        """Return whether the file is unchanged since the stamp was taken."""
        status = os.fstat(descriptor)
        same_time = status.st_nlink != self.links or status.st_ctime_ns == self.changed
        return (status.st_size, status.st_mtime_ns) == (self.size, self.written) and same_time
