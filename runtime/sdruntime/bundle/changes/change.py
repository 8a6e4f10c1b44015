"""Add and remove engines of a bundle that other processes use at the same time.

    building(bundle, stem)   reserves a name and a folder to build the engine in, without holding the lock meanwhile
    add_engine(...)          moves the built files, then writes the manifest, under the lock
    remove_engine(...)       writes the manifest, then removes the files, under the lock

A change is a function of the manifest, applied to the manifest on disk while the lock is held. If the process is killed at any
point, the bundle is either the old or the new one. The next change removes leftover files, once their builder has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from sdruntime.bundle.bundle import ENGINES, KNOWN_ENDINGS, Bundle, file_spec
from sdruntime.bundle.changes.lock import NAME as LOCK
from sdruntime.bundle.changes.lock import locked
from sdruntime.bundle.manifest import NAME, EngineSpec, Manifest, load_manifest, save_manifest
from sdruntime.errors import BundleError
from sdruntime.system.durable import sync_folder, temporary_prefix
from sdruntime.system.owner import Owner, in_use, names_in, owned_folder, remove_tree, started, sweep

SCRATCH = ".building-"
_TEMPORARY = (SCRATCH, f"{LOCK}.", temporary_prefix(NAME))  # prefixes of the temporary files and folders of a bundle
_EARLIER = re.compile(r"\.manifest\.json\.(\d+)|\.building-(\d+)-[a-z0-9_]{8}")  # names used by the first versions


def change_manifest(folder: Path, change: Callable[[Manifest], Manifest]) -> Bundle:
    """Replace the manifest by `change(manifest)`, and remove engine files that it no longer lists.

    `change` is called with the lock held, possibly more than once. Raises its errors, and BundleError.
    """
    with locked(folder):
        while True:
            before = load_manifest(folder)
            after = change(before)
            if after is before:
                break
            after = dataclasses.replace(after, generation=before.generation + 1)
            if load_manifest(folder) == before:  # always, unless the lock was removed by hand
                save_manifest(folder, after)
                break
        remove_leftovers(folder, after)
        return Bundle(folder, after)


def tidy(folder: Path) -> None:
    """Remove the leftovers of killed builds. Does nothing if the bundle is read-only."""
    try:
        with locked(folder):
            remove_leftovers(folder, load_manifest(folder))
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise


@contextlib.contextmanager
def building(bundle: Bundle, stem: str) -> Iterator[tuple[str, Path]]:
    """Yield a name for an engine and an empty folder on the bundle's disk to build it in, which is removed after the block.

    The name is `stem`, with a number if another engine uses it or is being built under it. Raises BundleError if another export
    has replaced the bundle, in place of any error that this causes in the block.
    """
    folder = bundle.folder
    try:
        with contextlib.ExitStack() as stack:
            with locked(folder):
                manifest = _current(bundle)
                remove_leftovers(folder, manifest)
                name = _free_name(stem, folder, manifest)
                place = stack.enter_context(owned_folder(folder, SCRATCH)) / name
                place.mkdir()
            yield name, place
    except BaseException as error:
        if bundle.opened.in_place():
            with contextlib.suppress(BundleError, OSError), locked(folder):  # otherwise the next change does it
                remove_leftovers(folder, load_manifest(folder))
        elif isinstance(error, Exception):
            raise _replaced(bundle) from error
        raise


def add_engine(
    bundle: Bundle,
    engine: EngineSpec,
    built: Mapping[str, Path],
    *,
    check: Callable[[Bundle], object] | None = None,
    present: Callable[[EngineSpec], bool] = lambda _: False,
) -> tuple[Bundle, bool]:
    """Add an engine that was built in the folder of `building`; return the new bundle and whether the engine was added.

    `built`: new path in the bundle -> built file. `check` is called with the changed bundle before the manifest is written; if it
    raises, the bundle is not changed. If another build has meanwhile added an engine for which `present` is true, that one is
    used instead. Raises BundleError if the component has been exported again since.
    """
    specs = {path: file_spec(source) for path, source in built.items()}  # hashed and synced before the lock is taken

    def with_engine(manifest: Manifest) -> Manifest:
        if any(present(existing) for existing in manifest.engines):
            return manifest
        sources = bundle.manifest.components[engine.component].files
        if [manifest.files.get(path) for path in sources] != [bundle.manifest.files[path] for path in sources]:
            raise BundleError(bundle.folder, [f"{engine.component} was exported again in the meantime: rebuild its engine"])
        return dataclasses.replace(manifest, engines=(*manifest.engines, engine), files={**manifest.files, **specs})

    def adopt(manifest: Manifest) -> Manifest:
        if not bundle.opened.in_place():
            raise _replaced(bundle)
        return with_engine(manifest)

    with locked(bundle.folder):
        manifest = _current(bundle)
        possible = with_engine(manifest)
        if possible is manifest:
            return Bundle(bundle.folder, manifest), False
        _place(bundle.folder, built)
    if check is not None:
        check(Bundle(bundle.folder, possible))
    changed = change_manifest(bundle.folder, adopt)
    return changed, engine in changed.manifest.engines


def remove_engine(bundle: Bundle, engine: EngineSpec) -> Bundle:
    """Remove an engine and return the changed bundle. Files are deleted after the manifest no longer lists them."""

    def without(manifest: Manifest) -> Manifest:
        if engine not in manifest.engines:
            return manifest
        kept = tuple(other for other in manifest.engines if other != engine)
        shared = {path for other in kept for path in other.files}
        files = {path: spec for path, spec in manifest.files.items() if path not in engine.files or path in shared}
        return dataclasses.replace(manifest, engines=kept, files=files)

    return change_manifest(bundle.folder, without)


def remove_leftovers(folder: Path, manifest: Manifest) -> None:
    """Remove the leftovers of killed builds: temporary files and folders, and engine files that the manifest does not list.

    The caller holds the lock. Files that are not named like an engine of this bundle are kept.
    """
    for prefix in _TEMPORARY:
        sweep(folder, prefix)
    for name in names_in(folder):
        if (match := _EARLIER.fullmatch(name)) and started(int(match[1] or match[2])) is None:
            remove_tree(folder / name)
    claimed = _claimed(folder)
    with _engines_folder(folder) as handle:
        for name in names_in(handle) if handle is not None else ():
            if f"{ENGINES}/{name}" in manifest.files or not engine_like(name, manifest.components):
                continue
            if not any(name.startswith(f"{stem}.") for stem in claimed):
                with contextlib.suppress(FileNotFoundError):
                    if stat.S_ISREG(os.stat(name, dir_fd=handle, follow_symlinks=False).st_mode):
                        os.unlink(name, dir_fd=handle)


def is_temporary(name: str) -> bool:
    """Return whether a name in a bundle's folder is that of its lock or of a temporary file or folder."""
    owned = any(name.startswith(prefix) and Owner.parse(name.removeprefix(prefix)) for prefix in _TEMPORARY)
    return name == LOCK or owned or _EARLIER.fullmatch(name) is not None


def engine_like(name: str, components: Mapping[str, object]) -> bool:
    """Return whether a file in `engines` has a name that builds use: COMPONENT-…, with a known ending."""
    return name.endswith(KNOWN_ENDINGS) and name.startswith(tuple(f"{component}-" for component in components))


def _current(bundle: Bundle) -> Manifest:
    """Load the manifest on disk. Raises BundleError if another bundle has replaced `bundle`."""
    if not bundle.opened.in_place():
        raise _replaced(bundle)
    return load_manifest(bundle.folder)


def _replaced(bundle: Bundle) -> BundleError:
    return BundleError(bundle.folder, ["replaced by another export while an engine of it was being built: build it again"])


def _place(folder: Path, built: Mapping[str, Path]) -> None:
    """Move built files into the engines folder and sync it. Raises BundleError rather than replace a file."""
    with contextlib.suppress(FileExistsError):
        (folder / ENGINES).mkdir()
    with _engines_folder(folder) as handle:
        assert handle is not None
        names = names_in(handle)
        for path, source in built.items():
            name = path.removeprefix(f"{ENGINES}/")
            if "/" in name or name in names:
                raise BundleError(folder, [f"{path}: a new engine may not replace an existing file"])
            os.rename(source, name, dst_dir_fd=handle)
        os.fsync(handle)
    sync_folder(folder)


@contextlib.contextmanager
def _engines_folder(folder: Path) -> Iterator[int | None]:
    """Yield a descriptor of the engines folder, or None if it does not exist.

    Raises BundleError if it is a symbolic link, so that nothing outside the bundle is changed.
    """
    try:
        handle = os.open(folder / ENGINES, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield None
        return
    except NotADirectoryError:
        what = "a symbolic link" if (folder / ENGINES).is_symlink() else "not a folder"
        raise BundleError(folder, [f"{ENGINES} is {what}: replace it by a folder to build engines here"]) from None
    try:
        yield handle
    finally:
        os.close(handle)


def _claimed(folder: Path) -> set[str]:
    """Return the names of the engines that are being built now."""
    claimed = set()
    for scratch in in_use(folder, SCRATCH):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            claimed.update(names_in(scratch))
    return claimed


def _free_name(stem: str, folder: Path, manifest: Manifest) -> str:
    """Return `stem`, or the first of `stem`-2, `stem`-3, … that no engine, build or file uses."""
    taken = {engine.name for engine in manifest.engines} | _claimed(folder)
    with _engines_folder(folder) as handle:
        files = names_in(handle) if handle is not None else []
    names = (stem if number == 1 else f"{stem}-{number}" for number in itertools.count(1))
    return next(name for name in names if name not in taken and not any(file.startswith(f"{name}.") for file in files))
