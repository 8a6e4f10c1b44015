"""Documents: small files that are read whole. In an untrusted folder, anything may have such a file's name.

Reading a FIFO could block for ever and a device may never end, so neither is opened. Links are followed: in a hub's cache every
file is a link.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

LARGEST = 8 << 20  # bytes. The manifest of a full-size bundle has 100 kB, CLIP's vocabulary 1 MB
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)


def open_regular(path: Path | str) -> BinaryIO:
    """Open a regular file for reading. Raises OSError, and ValueError if `path` is anything else."""
    _check_kind(Path(path).stat().st_mode)
    descriptor = os.open(path, _FLAGS)  # non-blocking: another file may take the name between the two calls
    try:
        _check_kind(os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_document(path: Path | str, *, most: int = LARGEST) -> bytes:
    """Return the bytes of a regular file. Raises OSError, and ValueError for more than `most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(most + 1) if size <= most else b""
    if max(size, len(data)) > most:
        raise ValueError(f"{max(size, len(data)):,} bytes; at most {most:,} are read")
    return data


def _check_kind(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ValueError(f"{_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a regular file")
