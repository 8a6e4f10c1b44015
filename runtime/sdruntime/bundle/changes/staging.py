"""Write a bundle to a temporary folder, move it into place by one rename, and then remove the bundle that it replaced.

Only bundles are ever replaced, and only if they contain no other files: see `check_place`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from sdruntime.bundle.bundle import ENGINES, disk_full_as_error
from sdruntime.bundle.changes.change import engine_like, is_temporary
from sdruntime.bundle.changes.lock import locked
from sdruntime.bundle.manifest import NAME, manifest_document, opened_folder
from sdruntime.errors import BundleError, quoted
from sdruntime.system.durable import make_folders, sync_folder, sync_tree
from sdruntime.system.owner import leftovers, owned_folder, remove_tree, sweep

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h
_SHOWN = 5
_INSTEAD = "choose another place, or remove it yourself"


@contextlib.contextmanager
def staging(place: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `place` at the end of the block, replacing an existing bundle.

    On an error or Ctrl-C, the folder is removed and `place` is not changed. Leftovers of killed exports to `place` are removed.
    Raises BundleError if `place` must not be replaced, OutOfSpace if the disk is full.
    """
    place = Path(os.path.abspath(place))  # noqa: PTH100  # resolve() would follow the last link
    place = place.parent.resolve() / place.name
    check_place(place)
    if is_mount(place):  # such as a container's volume, for which the final rename would fail
        inside = quoted(place / "bundle")
        raise BundleError(
            place, [f"a file system is mounted here, so it cannot be replaced: use a folder in it, such as {inside}"]
        )
    make_folders(place.parent)
    _recover(place)
    sweep(place.parent, _prefix(place, "staged"))
    with owned_folder(place.parent, _prefix(place, "staged")) as staged:
        with disk_full_as_error(place.parent):
            yield staged
            sync_tree(staged)
        _settle(staged, place)


def check_place(place: Path) -> None:
    """Raise BundleError unless a bundle may be written to `place`.

    It must not exist, be an empty folder, or be a bundle of this format and revision that contains no other files.
    """
    if place.is_symlink():
        raise BundleError(place, [f"a symbolic link is never replaced: use the folder that it points to, {place.resolve()}"])
    if not place.exists():
        return
    if not place.is_dir():
        raise BundleError(place, [f"this is a file, not a bundle: {_INSTEAD}"])
    if not any(place.iterdir()):
        return
    try:
        document = manifest_document(opened_folder(place))
    except BundleError as error:
        raise BundleError(place, [f"this is not a bundle: {_INSTEAD}", *error.faults]) from error
    files, components = document.get("files"), document.get("components")
    if not isinstance(files, dict) or not isinstance(components, dict):
        raise BundleError(place, [f"its manifest does not list its files, so it cannot be replaced: {_INSTEAD}"])
    others = list(_other_files(place, files, components))
    if others:
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        fault = f"files that do not belong to the bundle would be lost: {', '.join(others[:_SHOWN])}{more}"
        raise BundleError(place, [f"{fault}: move them, or choose another place"])


def is_mount(place: Path) -> bool:
    """Return whether `place` is a mount point. Only /proc lists bind mounts within one file system: proc(5), mountinfo."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        lines = []
    escaped = re.sub(rb"[ \t\n\\]", lambda match: b"\\%03o" % ord(match[0]), os.fsencode(place.resolve()))
    return place.is_mount() or any(line.split(b" ")[4:5] == [escaped] for line in lines)


def _other_files(place: Path, files: dict[str, object], components: dict[str, object]) -> Iterator[str]:
    """Yield the paths in a bundle that are neither listed nor created by engine builds."""
    folders = {parent.as_posix() for path in files for parent in Path(path).parents} | {ENGINES}

    def own(path: Path) -> bool:
        name = path.as_posix()
        engine = path.parent == Path(ENGINES) and engine_like(path.name, components)
        return name in files or name == NAME or is_temporary(name) or engine

    for here, inner, names in os.walk(place):
        at = Path(here).relative_to(place)
        for name in [*inner]:
            if (at / name).as_posix() not in folders or (place / at / name).is_symlink():
                inner.remove(name)
                names.append(name)
        yield from ((at / name).as_posix() for name in names if not own(at / name))


def _settle(staged: Path, place: Path) -> None:
    """Rename `staged` to `place`, or swap the two. The parent folder is synced before anything is removed."""
    try:
        staged.rename(place)  # succeeds if `place` does not exist or is an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        with locked(place):  # so that no engine is added to the bundle that is replaced
            check_place(place)
            _exchange(staged, place)
            sync_folder(place.parent)
    else:
        sync_folder(place.parent)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders atomically if the system supports it (Linux, renameat2), else with two renames in quick succession."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None and rename(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
        return
    aside = new.with_name(new.name.replace(_prefix(old, "staged"), _prefix(old, "former"), 1))
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    aside.rename(new)


def _recover(place: Path) -> None:
    """Restore a bundle whose replacement was killed between the two renames of `_exchange`."""
    for former in leftovers(place.parent, _prefix(place, "former")):
        if place.exists():
            remove_tree(former)
        else:
            former.rename(place)
            sync_folder(place.parent)


def _prefix(place: Path, what: str) -> str:
    return f".{place.name}.{what}-"
