"""The lock of a bundle: whoever changes its manifest or its folder holds it, for as long as a rename takes.

It is two locks. `flock` on the folder ends with its process, whatever happens; but on some file systems it does nothing. So the
holder also owns the folder `.lock`, which holds one empty file named by the holder's token. It is taken by renaming a folder that
already holds that file to `.lock`, which fails while `.lock` is not empty. The lock of a dead owner is broken by deleting the
file of that very name, so that a lock which somebody else has taken meanwhile cannot be broken by mistake.
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
_PATIENCE = 120.0  # seconds that one and the same holder is waited for
_PAUSES = (0.002, 0.1)  # seconds between tries, at first and at most
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the bundle in `folder`; `folder` is the same folder for the whole block. Not reentrant.

    Raises BundleError, naming the holder, when the same one has kept it for two minutes; OSError if `folder` cannot be written.
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
    """Take the lock of the open folder, if it is free and `folder` still is that folder."""
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
    """Pauses between tries, longer and longer, until one holder has been waited for too long."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._seconds = folder, _PAUSES[0]
        self._seen: list[str] = []
        self._since = time.monotonic()

    def pause(self, holders: list[str]) -> None:
        if holders != self._seen:
            self._seen, self._since = holders, time.monotonic()
        if time.monotonic() - self._since > _PATIENCE:
            raise BundleError(self._folder, [_told(holders, self._folder / NAME)])
        time.sleep(self._seconds)
        self._seconds = min(self._seconds * 1.5, _PAUSES[1])


def _told(holders: list[str], place: Path) -> str:
    owners = [Owner.parse(each) for each in holders]
    who = ", ".join(f"process {each.pid}" for each in owners if each) or "another process"
    known = "on this machine" if all(each and each.gone() is False for each in owners) else "perhaps on another machine"
    return (
        f"locked by {who} ({known}) for over {_PATIENCE:.0f} s: wait for it or end it; if it does not exist any more, "
        f"remove the folder {place}"
    )


def _take(folder: int, *, alone: bool) -> str | None:
    """Become the holder: the token that was written, None if another process is. `alone`: our flock proves that nobody on this
    kernel holds the lock."""
    owner = Owner.here()
    for other in _holders(folder):
        found = Owner.parse(other)
        gone = found and found.gone()
        if gone is None and alone and found and found.boot == owner.boot:  # in another container
            gone = True
        if not gone:
            return None
        _remove(f"{NAME}/{other}", folder)
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
    _remove(f"{name}/{token}", folder)
    try:
        os.rmdir(name, dir_fd=folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in _TAKEN:  # the next holder is there already
            raise


def _remove(path: str, folder: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path, dir_fd=folder)


def _holders(folder: int) -> list[str]:
    try:
        handle = os.open(NAME, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
    except FileNotFoundError:
        return []
    try:
        return names_in(handle)
    finally:
        os.close(handle)
