"""The lock of a bundle, held briefly by any process that changes its manifest or its folder.

It consists of two locks. `flock` on the folder always ends with its process, but does nothing on some file systems. So the holder
also owns the folder `.lock`, which contains one empty file named after the holder's token. The lock is taken by renaming a folder
that already contains this file to `.lock`, which fails while `.lock` is not empty. The lock of a dead owner is broken by deleting
the file with the dead owner's token, so a lock that another process has taken meanwhile cannot be broken by mistake.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from sdruntime.errors import BundleError
from sdruntime.system.files import leads_to
from sdruntime.system.owner import Owner, excludes, hold, names_in

NAME = ".lock"
_PATIENCE = 120.0  # seconds to wait for the same holder
_PAUSES = (0.002, 0.1)  # seconds between attempts, at first and at most
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the bundle in `folder`, which cannot be replaced during the block. Not reentrant.

    Raises BundleError, naming the holder, if the same one keeps the lock for two minutes; OSError if `folder` is not writable.
    """
    waiting = _Waiting(folder)
    while True:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                token = _try(folder, handle)
            except NotADirectoryError as error:
                fault = f"{NAME} is a file or a link, and a lock is a folder: remove {folder / NAME}"
                raise BundleError(folder, [fault]) from error
            if token is not None:
                try:
                    yield
                finally:
                    _discard(handle, NAME, token)
                return
            waiting.pause(_holders(handle))
        finally:
            os.close(handle)


def _try(folder: Path, handle: int) -> str | None:
    """Take the lock of the open folder and return its token; None if it is taken or `folder` is another folder by now."""
    held, token = hold(handle), None
    try:
        if held is not False:
            token = _take(handle, alone=bool(held) and excludes(handle))
    except FileNotFoundError:
        if leads_to(folder, handle):
            raise
    if token is not None and not leads_to(folder, handle):  # the bundle was replaced while we waited
        _discard(handle, NAME, token)
        token = None
    return token


class _Waiting:
    """Pauses of increasing length between attempts, until the same holder has kept the lock for too long."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._seconds = folder, _PAUSES[0]
        self._seen: list[str] = []
        self._since = time.monotonic()

    def pause(self, holders: list[str]) -> None:
        if holders != self._seen:
            self._seen, self._since = holders, time.monotonic()
        if time.monotonic() - self._since > _PATIENCE:
            raise BundleError(self._folder, [_timeout_fault(holders, self._folder / NAME)])
        time.sleep(self._seconds)
        self._seconds = min(self._seconds * 1.5, _PAUSES[1])


def _timeout_fault(holders: list[str], lock: Path) -> str:
    owners = [Owner.parse(holder) for holder in holders]
    who = ", ".join(f"process {owner.pid}" for owner in owners if owner) or "another process"
    where = "on this machine" if all(owner and owner.gone() is False for owner in owners) else "perhaps on another machine"
    return (
        f"locked by {who} ({where}) for over {_PATIENCE:.0f} s: wait for it or end it; if it does not exist any more, "
        f"remove the folder {lock}"
    )


def _take(folder: int, *, alone: bool) -> str | None:
    """Become the holder and return the token, or None if another process is. `alone`: our flock proves that no other process of
    this kernel holds the lock."""
    owner = Owner.here()
    for holder in _holders(folder):
        other = Owner.parse(holder)
        gone = other and other.gone()
        if gone is None and alone and other and other.boot == owner.boot:  # in another container
            gone = True
        if not gone:
            return None
        _remove(f"{NAME}/{holder}", folder)
    token = owner.token()
    staged = f"{NAME}.{token}"
    os.mkdir(staged, dir_fd=folder)
    try:
        os.close(os.open(f"{staged}/{token}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, dir_fd=folder))
        os.rename(staged, NAME, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException as error:
        _discard(folder, staged, token)
        if isinstance(error, OSError) and error.errno in _TAKEN:
            return None
        raise
    return token


def _discard(folder: int, name: str, token: str) -> None:
    """Remove a lock folder that holds `token`, but not one that another process has taken since."""
    _remove(f"{name}/{token}", folder)
    try:
        os.rmdir(name, dir_fd=folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in _TAKEN:  # the next holder has already taken it
            raise


def _remove(path: str, folder: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path, dir_fd=folder)


def _holders(folder: int) -> list[str]:
    """Return the tokens in the lock folder."""
    try:
        handle = os.open(NAME, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
    except FileNotFoundError:
        return []
    try:
        return names_in(handle)
    finally:
        os.close(handle)
