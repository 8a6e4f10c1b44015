"""Write files so that a power cut leaves the old or the new content: data is synced before its name, then the folder.

Every file that is replaced as a whole is written by this module. Folders are replaced in `sdruntime.bundle.changes.staging`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from sdruntime.system.owner import Owner, sweep

_LONGEST = 100  # bytes of a file's name that its temporary file's name keeps
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)  # file systems without fsync, folders without read permission


def replace_file(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to a temporary file beside `path`, then rename it, so that `path` has the old or the new content, also after a
    power cut. Removes leftovers of killed writers of `path`. Raises OSError."""
    _write_file(path, data, lambda staged: staged.replace(path))


def create_file(path: Path, data: bytes | memoryview) -> None:
    """Write `data` as `replace_file` does, but never replace a file. Raises FileExistsError, OSError."""

    def publish(staged: Path) -> None:
        try:
            path.hardlink_to(staged)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            path.touch(exist_ok=False)
            staged.replace(path)
        else:
            staged.unlink()

    _write_file(path, data, publish)


def _write_file(path: Path, data: bytes | memoryview, publish: Callable[[Path], object]) -> None:
    prefix = temporary_prefix(path.name)
    sweep(path.parent, prefix)
    staged = path.with_name(f"{prefix}{Owner.here().token()}")
    try:
        with staged.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(staged)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def temporary_prefix(name: str) -> str:
    """Return the prefix of the names of temporary files for a file `name`."""
    return f".{name.encode()[:_LONGEST].decode(errors='ignore')}."


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder. Without this, a file whose data is synced may have no name after a power cut."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def sync_tree(folder: Path) -> None:
    """Sync every file and folder of a tree, except links."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            if path.is_file() and not path.is_symlink():
                handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
        sync_folder(Path(place))


def make_folders(folder: Path) -> None:
    """Create a folder and its missing parents, and sync each name."""
    if not folder.exists():
        make_folders(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
