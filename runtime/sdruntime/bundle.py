"""A bundle on disk: files that are checked before they are believed, and changes that happen wholly or not at all.

    staging(place)           a folder beside `place` that takes its name at the end, or goes without a trace
    Bundle.open(folder)      manifest and sizes checked; `Bundle.read` and `Bundle.lending` check the hash of what they hand out
    bundle.add_engine(...)   the engine's files, then the manifest, by one rename each

A bundle's engines are code: the hashes tell a damaged file, not an evil one. Open bundles from people you trust.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import mmap
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdruntime.errors import BundleError, OutOfSpace
from sdruntime.manifest import (
    NAME,
    ComponentSpec,
    EngineSpec,
    FileSpec,
    Manifest,
    ModelSpec,
    Precision,
    load_manifest,
    save_manifest,
)
from sdruntime.record import json_from_text

ENGINES = "engines"
_KNOWN_ENDINGS = (".onnx", ".data", ".json", ".txt", ".plan", ".xml", ".bin", ".npz", ".md")
_CHUNK = 1 << 24
_PAUSE = 0.05  # seconds
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder and its manifest. Made by `Bundle.open`, which checks that every listed file is there, regular and of its size."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path | str) -> Bundle:
        """Raises BundleError with every fault of the manifest and of the listed files."""
        folder = Path(folder)
        manifest = load_manifest(folder)
        faults = [fault for path, spec in manifest.files.items() if (fault := _file_fault(folder, path, spec))]
        if faults:
            raise BundleError(folder, faults)
        return cls(folder, manifest)

    def read(self, path: str) -> memoryview:
        """The bytes of a listed file, mapped and read-only, their hash already checked. Raises BundleError."""
        view = self._map(path)
        self._check(path, hashlib.sha256(view).hexdigest())
        return view

    @contextlib.contextmanager
    def lending(self, paths: Iterable[str]) -> Iterator[dict[str, memoryview]]:
        """As `read`, for weights that a library takes in: their hashes are checked, on a thread, while the block runs, which ends
        when that is done too. What was made of them is to be believed after the block, and their pages are given back meanwhile
        (`giving_back`). Raises BundleError, in place of what went wrong in the block because of it."""
        views = {path: self._map(path) for path in paths}
        stopped = threading.Event()
        with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
            hashes = {path: pool.submit(_hash, view, stopped) for path, view in views.items()}
            for view in views.values():
                stack.enter_context(giving_back(view))
            try:
                yield views
            except Exception:
                self._check_all(hashes)
                raise
            except BaseException:
                stopped.set()
                raise
            self._check_all(hashes)

    def _map(self, path: str) -> memoryview:
        if path not in self.manifest.files:
            raise BundleError(self.folder, [f"{path}: not among the manifest's files"])
        return _mapped(self.folder / path)

    def _check(self, path: str, found: str) -> None:
        if found != (spec := self.manifest.files[path]).sha256:
            raise BundleError(
                self.folder, [f"{path}: changed since it was written ({_unlike(found, spec)}); restore it or export again"]
            )

    def _check_all(self, hashes: Mapping[str, Future[str]]) -> None:
        for path, found in hashes.items():
            self._check(path, found.result())

    def read_json(self, path: str) -> Any:
        """A listed JSON document. Raises BundleError."""
        try:
            return json_from_text(str(self.read(path), encoding="utf-8"))
        except ValueError as error:
            raise BundleError(self.folder, [f"{path}: not readable: {error}"]) from error

    def changed_files(self) -> list[str]:
        """A fault for each listed file whose hash is not the manifest's: the whole bundle is read."""
        return [
            f"{path}: changed ({_unlike(found, spec)})"
            for path, spec in self.manifest.files.items()
            if (found := sha256(self.folder / path)) != spec.sha256
        ]

    def with_files(self, files: Mapping[str, bytes]) -> Bundle:
        """A bundle that is still staged, with these files as well, each in a folder of the bundle."""
        listed = dict(self.manifest.files)
        for path, data in files.items():
            place = self.folder / path
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(data)
            listed[path] = file_spec(place)
            _sync(place.parent)
        manifest = dataclasses.replace(self.manifest, files=dict(sorted(listed.items())))
        save_manifest(self.folder, manifest)
        return Bundle(self.folder, manifest)

    def add_engine(
        self, engine: EngineSpec, built: Mapping[str, Path], *, check: Callable[[Bundle], object] = lambda _: None
    ) -> Bundle:
        """The bundle with `engine`, its files moved in from `built` (new path in the bundle -> built file on the same disk).

        `check` is given that bundle before its manifest is written; where it raises, the former bundle stays. Killed at any
        point, the former bundle is still valid: files that no manifest lists are debris, and are removed here.
        """
        (self.folder / ENGINES).mkdir(exist_ok=True)
        files = dict(self.manifest.files)
        for path, source in built.items():
            if path in files:
                raise BundleError(self.folder, [f"{path}: a new engine may not take the place of a listed file"])
            files[path] = file_spec(source)
            source.replace(self.folder / path)
        engines = (*self.manifest.engines, engine)
        try:
            check(Bundle(self.folder, dataclasses.replace(self.manifest, engines=engines, files=files)))
        except BaseException:
            for path in built:
                (self.folder / path).unlink()
            raise
        _sync(self.folder / ENGINES)
        return self._with_engines(engines, files)

    def remove_engine(self, engine: EngineSpec) -> Bundle:
        """The bundle without `engine`: its files go after the manifest has forgotten them."""
        files = {path: spec for path, spec in self.manifest.files.items() if path not in engine.files}
        return self._with_engines(tuple(each for each in self.manifest.engines if each.name != engine.name), files)

    def _with_engines(self, engines: tuple[EngineSpec, ...], files: Mapping[str, FileSpec]) -> Bundle:
        manifest = dataclasses.replace(self.manifest, engines=engines, files=files)
        save_manifest(self.folder, manifest)
        for found in (self.folder / ENGINES).iterdir():
            if found.is_file() and f"{ENGINES}/{found.name}" not in files:
                found.unlink()
        return Bundle(self.folder, manifest)


@contextlib.contextmanager
def staging(place: Path) -> Iterator[Path]:
    """An empty folder beside `place` that becomes `place` at the end of the block; what stood there is removed after that.

    On an error or Ctrl-C the folder goes and `place` is as it was. Raises OutOfSpace when the disk is full.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{place.name}.staged-", dir=place.parent))
    try:
        with disk_full_as_error(place.parent):
            yield staged
            staged.chmod(0o755)
        if place.exists():
            _exchange(staged, place)
        else:
            staged.rename(place)
        _sync(place.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextlib.contextmanager
def disk_full_as_error(folder: Path) -> Iterator[None]:
    """Raise OutOfSpace, with the free bytes of `folder`'s disk, in place of the system's error for a full disk or quota."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(folder).free
        raise OutOfSpace(f"{folder}: the disk is full ({free:,} bytes are free): free some space, or write elsewhere") from error


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step where the system can (Linux, renameat2), else in the two that leave the shortest gap."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None and rename(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
        return
    aside = new.with_name(new.name + ".former")
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    aside.rename(new)


def write_bundle(
    folder: Path,
    *,
    model: ModelSpec,
    precision: Precision,
    components: Mapping[str, ComponentSpec],
    provenance: Mapping[str, Any],
) -> Manifest:
    """Write the manifest of the bundle whose files lie in `folder`: each is synced, sized and hashed. Raises BundleError."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    files = {path.relative_to(folder).as_posix(): file_spec(path) for path in paths}
    try:
        manifest = Manifest(model=model, precision=precision, components=components, files=files, provenance=provenance)
    except ValueError as error:
        raise BundleError(folder, str(error).split("; ")) from error
    save_manifest(folder, manifest)
    return manifest


def file_spec(path: Path) -> FileSpec:
    """Size and hash of a file, which is synced to the disk first."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return FileSpec(size=path.stat().st_size, sha256=sha256(path))


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _hash(view: memoryview, stopped: threading.Event) -> str:
    digest = hashlib.sha256()
    for at in range(0, len(view), _CHUNK):
        if not stopped.is_set():
            digest.update(view[at : at + _CHUNK])
    return digest.hexdigest()


@contextlib.contextmanager
def giving_back(view: memoryview) -> Iterator[None]:
    """While a library takes in a view that `Bundle.read` gave: its pages go back to the system again and again, so that they are
    never all in memory beside what the library makes of them. Touched later, a byte is read from the file again. Where the system
    has no such call, nothing."""
    done = threading.Event()
    giver = threading.Thread(target=_give_back, args=(view.obj, done), daemon=True)
    giver.start()
    try:
        yield
    finally:
        done.set()
        giver.join()


def _give_back(mapped: object, done: threading.Event) -> None:
    last = not isinstance(mapped, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED")
    while not last:
        last = done.wait(_PAUSE)
        mapped.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _file_fault(folder: Path, path: str, spec: FileSpec) -> str | None:
    if not path.endswith(_KNOWN_ENDINGS):
        return f"{path}: a file of unknown kind (known: {' '.join(_KNOWN_ENDINGS)})"
    # no part of the way may be a link: nothing outside the folder is ever read
    for part in [*reversed((folder / path).relative_to(folder).parents)][1:]:
        if (folder / part).is_symlink():
            return f"{path}: {part} is a link"
    try:
        status = (folder / path).lstat()
    except OSError:
        return f"{path}: missing"
    if not stat.S_ISREG(status.st_mode):
        return f"{path}: not a regular file"
    if status.st_size != spec.size:
        return f"{path}: {status.st_size:,} bytes, but the manifest says {spec.size:,}"
    return None


def _unlike(found: str, spec: FileSpec) -> str:
    return f"sha256 {found[:12]}…, but the manifest says {spec.sha256[:12]}…"


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
