"""A bundle on disk, whose files are checked before they are used.

    Bundle.open(folder)      checks the manifest and all sizes; `Bundle.read` and `Bundle.lending` check hashes
    opening(folder, use)     the same, and opens the bundle again if it changes while it is used
    write_bundle(folder)     writes the manifest for existing files; sdruntime.bundle.changes.staging moves the bundle into place

sdruntime.bundle.changes.change adds and removes engines.

A bundle's engines are code: hashes detect damaged files, not malicious ones. See docs/trust.md for the guarantees.
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

from sdruntime.bundle.lending import hashing, mapped, releasing_pages, watching
from sdruntime.bundle.manifest import (
    NAME,
    ComponentSpec,
    FileSpec,
    Manifest,
    Precision,
    opened_folder,
    read_manifest,
    save_manifest,
)
from sdruntime.bundle.model import LinearPreview, ModelSpec
from sdruntime.bundle.records import json_from_text
from sdruntime.errors import BundleError, OutOfSpace, SettingError, plain, shown
from sdruntime.system.document import LARGEST
from sdruntime.system.durable import sync_folder
from sdruntime.system.files import FileFault, Folder, hash_of, leads_to, read_all

T = TypeVar("T")
ENGINES = "engines"
KNOWN_ENDINGS = (".onnx", ".data", ".json", ".txt", ".plan", ".xml", ".bin", ".npz", ".safetensors", ".md")
_OPENED = 100  # attempts to open a bundle that keeps changing


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder and its manifest. `Bundle.open` checks that every listed file exists, is a regular file, and has the listed size.

    The folder is opened once, as `opened`. If another bundle takes its place later, this one still reads the original files.
    """

    folder: Path
    manifest: Manifest
    opened: Folder = field(default=None, repr=False, compare=False)  # type: ignore[assignment]  # set in __post_init__

    def __post_init__(self) -> None:
        if self.opened is None:
            object.__setattr__(self, "opened", opened_folder(self.folder))

    def __repr__(self) -> str:
        model, precision, engines = self.manifest.model, self.manifest.precision, len(self.manifest.engines)
        return f"<Bundle {os.fspath(self.folder)!r}: {model.name} ({model.family}, {precision}), {engines} engines>"

    @classmethod
    def open(cls, folder: Path | str) -> Bundle:
        """Open the bundle in `folder`, again if it changes meanwhile.

        Raises BundleError with every fault of the manifest and the listed files.
        """
        return opening(folder, lambda bundle: bundle)

    def superseded(self) -> bool:
        """Return whether the bundle on disk has changed since it was opened: some of its files may be gone."""
        return not self.opened.in_place() or read_manifest(self.opened) != self.manifest

    def read(self, path: str, *, most: int | None = None) -> memoryview:
        """Read a listed file into memory and check its hash. Raises BundleError, also if it has more than `most` bytes."""
        if most is not None and path in self.manifest.files and (size := self.manifest.files[path].size) > most:
            raise BundleError(self.folder, [f"{path}: {size:,} bytes; at most {most:,} are read"])
        with self._opened([path]) as files:
            data = read_all(files[path], self.manifest.files[path].size)
        self._verify(path, hashlib.sha256(data).hexdigest())
        return memoryview(data)

    @contextlib.contextmanager
    def lending(self, paths: Iterable[str], *, verified: bool = False) -> Iterator[dict[str, memoryview]]:
        """Yield memory maps of large files, by path, for a library that reads them while the block runs.

        Hashes are checked while the block runs, or before it if `verified`; pages are released while it runs
        (`releasing_pages`). Trust the library's result only after the block, when it must no longer refer to the maps. Raises
        BundleError, in place of an error from the block, if a hash is wrong or a file was written to.
        """
        with self._watched(paths) as files, contextlib.ExitStack() as stack:
            if verified:
                for path, descriptor in files.items():
                    self._verify(path, hash_of(descriptor))
            else:
                stack.enter_context(hashing(files, self._verify))
            views = {path: mapped(descriptor) for path, descriptor in files.items()}
            for view in () if verified else views.values():
                stack.enter_context(releasing_pages(view))
            yield views

    @contextlib.contextmanager
    def lending_names(self, paths: Iterable[str]) -> Iterator[None]:
        """Check the hashes of these files, and let a library open them by name while the block runs.

        Raises BundleError as `lending` does, and if a name no longer leads to the file that was hashed.
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
        """Yield descriptors of listed files after checking their sizes. Raises BundleError."""
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

    def _verify(self, path: str, digest: str) -> None:
        if digest != (spec := self.manifest.files[path]).sha256:
            raise BundleError(
                self.folder, [f"{path}: changed since it was written ({_mismatch(digest, spec)}); restore it or export again"]
            )

    def _changed(self, paths: list[str]) -> BundleError:
        return BundleError(self.folder, [f"{path}: changed while it was read; retry when its writer is done" for path in paths])

    def read_json(self, path: str) -> Any:
        """Read and parse a listed JSON file. Raises BundleError."""
        try:
            return json_from_text(str(self.read(path, most=LARGEST), encoding="utf-8"))
        except ValueError as error:
            raise BundleError(self.folder, [f"{path}: not readable: {plain(error)}"]) from error

    def changed_files(self) -> list[str]:
        """Read the whole bundle and return a fault for each listed file whose hash differs from the manifest's."""
        faults = []
        for path, spec in self.manifest.files.items():
            try:
                with self.opened.open(path) as descriptor:
                    actual = hash_of(descriptor)
            except FileFault as error:
                faults.append(str(error))
            else:
                faults += [f"{path}: changed ({_mismatch(actual, spec)})"] if actual != spec.sha256 else []
        return faults

    def checked(self) -> Bundle:
        """Check the hash of every listed file and return this bundle. Raises BundleError."""
        if faults := self.changed_files():
            raise BundleError(self.folder, faults)
        return self

    def with_files(self, files: Mapping[str, bytes]) -> Bundle:
        """Write files (path in the bundle -> content) into a staged bundle, and return it with them listed."""
        listed = dict(self.manifest.files)
        for path, data in files.items():
            target = self.folder / path
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(data)
            listed[path] = file_spec(target)
            sync_folder(target.parent)
        return self._with(files=dict(sorted(listed.items())))

    def with_preview(self, preview: LinearPreview) -> Bundle:
        """Write the weights of linear previews into the manifest of a staged bundle, and return it."""
        return self._with(model=dataclasses.replace(self.manifest.model, preview=preview))

    def _with(self, **fields: Any) -> Bundle:
        manifest = dataclasses.replace(self.manifest, **fields)
        save_manifest(self.folder, manifest)
        return Bundle(self.folder, manifest)


def opening(folder: Path | str, use: Callable[[Bundle], T]) -> T:
    """Open the bundle in `folder` and return `use(bundle)`. If that fails because the bundle changed meanwhile, try again.

    Raises BundleError with every fault of the manifest and the listed files, SettingError for a `folder` that is no path, and the
    errors of `use`.
    """
    if not isinstance(folder, str | os.PathLike):
        raise SettingError(f"bundle {shown(folder)}: expected the path of its folder, as text or a pathlib.Path")
    folder = Path(folder)
    for _ in range(_OPENED):
        opened, bundle = opened_folder(folder), None
        try:
            bundle = Bundle(folder, read_manifest(opened), opened)
            if faults := [fault for path, spec in bundle.manifest.files.items() if (fault := _file_fault(opened, path, spec))]:
                raise BundleError(folder, faults)
            return use(bundle)
        except Exception:  # libraries raise errors of their own for a missing file
            if opened.in_place() and (bundle is None or not bundle.superseded()):
                raise
    raise BundleError(folder, [f"changed {_OPENED} times while it was being opened: try again when its builds are done"])


@contextlib.contextmanager
def disk_full_as_error(folder: Path) -> Iterator[None]:
    """Turn the OSError of a full disk or an exceeded quota into OutOfSpace, with the free bytes of `folder`'s disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise disk_full(folder) from error


def disk_full(folder: Path) -> OutOfSpace:
    """Return the error for a full disk."""
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
    """Sync and hash the files in `folder` and write the bundle's manifest, which is returned. Raises BundleError."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    files = {path.relative_to(folder).as_posix(): file_spec(path) for path in paths}
    try:
        manifest = Manifest(model=model, precision=precision, components=components, files=files, provenance=provenance)
    except ValueError as error:
        raise BundleError(folder, str(error).split("; ")) from error
    save_manifest(folder, manifest)
    return manifest


def file_spec(path: Path) -> FileSpec:
    """Sync a file to disk and return its size and hash."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return FileSpec(size=path.stat().st_size, sha256=sha256(path))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, reading it in chunks."""
    with path.open("rb") as file:
        return hash_of(file.fileno())


def _file_fault(opened: Folder, path: str, spec: FileSpec) -> str | None:
    if not path.endswith(KNOWN_ENDINGS):
        return f"{path}: unknown file type (known: {' '.join(KNOWN_ENDINGS)})"
    try:
        return _size_fault(path, opened.status(path), spec)
    except FileFault as error:
        return str(error)


def _size_fault(path: str, status: os.stat_result, spec: FileSpec) -> str | None:
    return None if status.st_size == spec.size else f"{path}: {status.st_size:,} bytes, but the manifest says {spec.size:,}"


def _mismatch(actual: str, spec: FileSpec) -> str:
    return f"sha256 {actual[:12]}…, but the manifest says {spec.sha256[:12]}…"
