"""Writing so that a power cut leaves the old or the new: data is synced before its name, and folders are synced too."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from sdruntime.system.owner import Owner, sweep

_LONGEST = 100  # bytes of a file's own name in that of its temporary file
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)  # file systems without it, folders that may only be written


def replace_file(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to a temporary file beside `path`, then rename it: `path` has the old content or the new, also after a power
    cut. Leftovers of killed writers of `path` are removed. Raises OSError."""
    _write_file(path, data, lambda staged: staged.replace(path))


def create_file(path: Path, data: bytes | memoryview) -> None:
    """As `replace_file`, where no file may have the name yet, nor get it meanwhile. Raises FileExistsError, OSError."""

    def give_name(staged: Path) -> None:
        try:
            path.hardlink_to(staged)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            path.touch(exist_ok=False)
            staged.replace(path)
        else:
            staged.unlink()

    _write_file(path, data, give_name)


def _write_file(path: Path, data: bytes | memoryview, give_name: Callable[[Path], object]) -> None:
    prefix = temporary_prefix(path.name)
    sweep(path.parent, prefix)
    staged = path.with_name(f"{prefix}{Owner.here().token()}")
    try:
        with staged.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        give_name(staged)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def temporary_prefix(name: str) -> str:
    """What the names of temporary files of a file `name` begin with."""
    return f".{name.encode()[:_LONGEST].decode(errors='ignore')}."


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last: without it a file whose data is synced may have no name after a power cut."""
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
    """Sync every file and folder of a tree, links excepted."""
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
    """Make a folder and its parents, each name synced."""
    if not folder.exists():
        make_folders(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
