"""A bundle on disk: files that are checked before they are believed.

    Bundle.open(folder)      manifest and sizes checked; `Bundle.read` and `Bundle.lending` check the hash of what they hand out
    opening(folder, use)     the same, again if the bundle changed while it was being used
    write_bundle(folder)     the manifest of files that are written; sdruntime.bundle.staging puts them in place

Engines are added and removed by sdruntime.bundle.change.

A bundle's engines are code: the hashes tell a damaged file, not an evil one. docs/trust.md says what is promised.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sdruntime.bundle.lending import giving_back, hashing, mapped, watching
from sdruntime.bundle.manifest import (
    NAME,
    ComponentSpec,
    FileSpec,
    Manifest,
    ModelSpec,
    Precision,
    opened_folder,
    read_manifest,
    save_manifest,
)
from sdruntime.bundle.records import json_from_text
from sdruntime.errors import BundleError, OutOfSpace, plain
from sdruntime.system.document import LARGEST
from sdruntime.system.durable import sync_folder
from sdruntime.system.files import FileFault, Folder, hash_of, leads_to, read_all

T = TypeVar("T")
ENGINES = "engines"
KNOWN_ENDINGS = (".onnx", ".data", ".json", ".txt", ".plan", ".xml", ".bin", ".npz", ".md")
_OPENED = 100  # times that a bundle is opened again because it changed meanwhile


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder and its manifest. `Bundle.open` checks that every listed file is present, regular and of its size.

    The folder is opened once, as `opened`: another bundle that takes its name later is not seen.
    """

    folder: Path
    manifest: Manifest
    opened: Folder = field(default=None, repr=False, compare=False)  # type: ignore[assignment]  # opened where it is not given

    def __post_init__(self) -> None:
        if self.opened is None:
            object.__setattr__(self, "opened", opened_folder(self.folder))

    def __repr__(self) -> str:
        model, precision, engines = self.manifest.model, self.manifest.precision, len(self.manifest.engines)
        return f"<Bundle {os.fspath(self.folder)!r}: {model.name} ({model.family}, {precision}), {engines} engines>"

    @classmethod
    def open(cls, folder: Path | str) -> Bundle:
        """Raises BundleError with every fault of the manifest and of the listed files. A bundle that changes meanwhile is read
        again."""
        return opening(folder, lambda bundle: bundle)

    def superseded(self) -> bool:
        """Whether the bundle on disk is not the one that was opened any more: some of its files may be gone."""
        return not self.opened.in_place() or read_manifest(self.opened) != self.manifest

    def read(self, path: str, *, most: int | None = None) -> memoryview:
        """Return the bytes of a listed file, in memory of this process, after checking their hash. Raises BundleError, also for
        more than `most` bytes."""
        if most is not None and path in self.manifest.files and (size := self.manifest.files[path].size) > most:
            raise BundleError(self.folder, [f"{path}: {size:,} bytes; at most {most:,} are read"])
        with self._opened([path]) as files:
            data = read_all(files[path], self.manifest.files[path].size)
        self._verify(path, hashlib.sha256(data).hexdigest())
        return memoryview(data)

    @contextlib.contextmanager
    def lending(self, paths: Iterable[str], *, verified: bool = False) -> Iterator[dict[str, memoryview]]:
        """Yield maps of large files, by path, for a library that takes them in while the block runs.

        Their hashes are checked meanwhile, or before the block where `verified`; their pages are released meanwhile
        (`giving_back`). What was made of them is to be believed after the block, and must not refer to them then. Raises
        BundleError, in place of what went wrong in the block because of it, where a hash is wrong or a file was written to.
        """
        with self._watched(paths) as files, contextlib.ExitStack() as stack:
            if verified:
                for path, descriptor in files.items():
                    self._verify(path, hash_of(descriptor))
            else:
                stack.enter_context(hashing(files, self._verify))
            views = {path: mapped(descriptor) for path, descriptor in files.items()}
            for view in () if verified else views.values():
                stack.enter_context(giving_back(view))
            yield views

    @contextlib.contextmanager
    def lending_names(self, paths: Iterable[str]) -> Iterator[None]:
        """While the block runs, a library may open these files by their names: their hashes are checked before the block.

        Raises BundleError as `lending` does, and where a name did not lead to the file that was hashed.
        """
        with self._watched(paths) as files:
            for path, descriptor in files.items():
                self._verify(path, hash_of(descriptor))
            yield
            for path, descriptor in files.items():
                if not leads_to(self.folder / path, descriptor):
                    raise self._changed([path])

    @contextlib.contextmanager
    def _watched(self, paths: Iterable[str]) -> Iterator[dict[str, int]]:
        with self._opened(paths) as files, watching(files, self._changed):
            yield files

    @contextlib.contextmanager
    def _opened(self, paths: Iterable[str]) -> Iterator[dict[str, int]]:
        """Yield descriptors of listed files, of the sizes that the manifest says. Raises BundleError."""
        with contextlib.ExitStack() as stack:
            files = {}
            for path in paths:
                if path not in self.manifest.files:
                    raise BundleError(self.folder, [f"{path}: not among the manifest's files"])
                try:
                    files[path] = stack.enter_context(self.opened.open(path))
                except FileFault as error:
                    raise BundleError(self.folder, [str(error)]) from error
                if fault := _size_fault(path, os.fstat(files[path]), self.manifest.files[path]):
                    raise BundleError(self.folder, [fault])
            yield files

    def _verify(self, path: str, found: str) -> None:
        if found != (spec := self.manifest.files[path]).sha256:
            raise BundleError(
                self.folder, [f"{path}: changed since it was written ({_unlike(found, spec)}); restore it or export again"]
            )

    def _changed(self, paths: list[str]) -> BundleError:
        return BundleError(self.folder, [f"{path}: changed while it was read; retry when its writer is done" for path in paths])

    def read_json(self, path: str) -> Any:
        """A listed JSON document. Raises BundleError."""
        try:
            return json_from_text(str(self.read(path, most=LARGEST), encoding="utf-8"))
        except ValueError as error:
            raise BundleError(self.folder, [f"{path}: not readable: {plain(error)}"]) from error

    def changed_files(self) -> list[str]:
        """A fault for each listed file whose hash is not the manifest's: the whole bundle is read."""
        faults = []
        for path, spec in self.manifest.files.items():
            try:
                with self.opened.open(path) as descriptor:
                    found = hash_of(descriptor)
            except FileFault as error:
                faults.append(str(error))
            else:
                faults += [f"{path}: changed ({_unlike(found, spec)})"] if found != spec.sha256 else []
        return faults

    def checked(self) -> Bundle:
        """This bundle, after checking the hash of every listed file. Raises BundleError."""
        if faults := self.changed_files():
            raise BundleError(self.folder, faults)
        return self

    def with_files(self, files: Mapping[str, bytes]) -> Bundle:
        """A bundle that is still staged, with these files as well, each in a folder of the bundle."""
        listed = dict(self.manifest.files)
        for path, data in files.items():
            place = self.folder / path
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(data)
            listed[path] = file_spec(place)
            sync_folder(place.parent)
        manifest = dataclasses.replace(self.manifest, files=dict(sorted(listed.items())))
        save_manifest(self.folder, manifest)
        return Bundle(self.folder, manifest)


def opening(folder: Path | str, use: Callable[[Bundle], T]) -> T:
    """`use` of the bundle in `folder`. If it fails and the bundle has been changed meanwhile, the bundle is opened again.

    Raises BundleError with every fault of the manifest and of the listed files, and what `use` raises.
    """
    folder = Path(folder)
    for _ in range(_OPENED):
        opened, bundle = opened_folder(folder), None
        try:
            bundle = Bundle(folder, read_manifest(opened), opened)
            if faults := [fault for path, spec in bundle.manifest.files.items() if (fault := _file_fault(opened, path, spec))]:
                raise BundleError(folder, faults)
            return use(bundle)
        except Exception:  # libraries raise their own where a file is missing
            if opened.in_place() and (bundle is None or not bundle.superseded()):
                raise
    raise BundleError(folder, [f"changed {_OPENED} times while it was being opened: try again when its builds are done"])


@contextlib.contextmanager
def disk_full_as_error(folder: Path) -> Iterator[None]:
    """Raise OutOfSpace, with the free bytes of `folder`'s disk, in place of the system's error for a full disk or quota."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise disk_full(folder) from error


def disk_full(folder: Path) -> OutOfSpace:
    free = shutil.disk_usage(folder).free
    return OutOfSpace(f"{folder}: the disk is full ({free:,} bytes are free): free some space, or write elsewhere")


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
    with path.open("rb") as file:
        return hash_of(file.fileno())


def _file_fault(opened: Folder, path: str, spec: FileSpec) -> str | None:
    if not path.endswith(KNOWN_ENDINGS):
        return f"{path}: a file of unknown kind (known: {' '.join(KNOWN_ENDINGS)})"
    try:
        return _size_fault(path, opened.status(path), spec)
    except FileFault as error:
        return str(error)


def _size_fault(path: str, status: os.stat_result, spec: FileSpec) -> str | None:
    return None if status.st_size == spec.size else f"{path}: {status.st_size:,} bytes, but the manifest says {spec.size:,}"


def _unlike(found: str, spec: FileSpec) -> str:
    return f"sha256 {found[:12]}…, but the manifest says {spec.sha256[:12]}…"
