"""An adapter file: a safetensors file whose tensors are read one by one, each time from the bytes that were hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sdruntime.adapters.safetensors import Extent, header_of
from sdruntime.arrays import Array
from sdruntime.errors import SettingError, plain
from sdruntime.system.document import open_regular
from sdruntime.system.files import Stamp

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")  # torch.save, before and since its archives
_PIECE = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """An adapter file. `sha256`: of the file. `data_sha256`: of its data without the header, the hash of other programs."""

    path: Path
    tensors: Mapping[str, Extent]
    metadata: Mapping[str, str]
    sha256: str
    data_sha256: str
    stamp: Stamp
    what: str = "LoRA"

    @classmethod
    def open(cls, path: Path | str, *, what: str = "LoRA") -> AdapterFile:
        """Read the header of a file and hash the file; `what` is its kind, for errors.

        Raises SettingError for another kind of file or a damaged one.
        """
        path = Path(path)
        try:
            with open_regular(path) as file:
                stamp = Stamp.of(file.fileno())
                if file.read(4).startswith(_PICKLES):
                    raise ValueError("a pickle, which can run code when it is read: convert it to .safetensors")
                file.seek(0)
                header = header_of(file)
                whole, data = _hashes(file, header.start)
        except (OSError, ValueError) as error:
            raise SettingError(f"{what} {path}: {plain(error)}") from error
        unreadable = sorted({tensor.dtype for tensor in header.tensors.values()} - _DTYPES.keys())
        if unreadable:
            raise SettingError(f"{what} {path}: tensors of type {', '.join(unreadable)} are not supported: save it as F16 or F32")
        if not header.tensors:
            raise SettingError(f"{what} {path}: the file has no tensors")
        return cls(
            path=path, tensors=header.tensors, metadata=header.metadata, sha256=whole, data_sha256=data, stamp=stamp, what=what
        )

    @property
    def name(self) -> str:
        """The file's name without its ending, as prompts refer to it."""
        return self.path.stem

    @property
    def short_hash(self) -> str:
        """The hash that AUTOMATIC1111's web UI writes into the metadata of images."""
        return self.metadata.get("sshs_model_hash", self.data_sha256)[:12]

    def unchanged(self) -> bool:
        """Return whether the path still leads to the file that was opened."""
        try:
            with open_regular(self.path) as file:
                return self.stamp.holds(file.fileno())
        except (OSError, ValueError):
            return False

    def read(self, keys: Iterable[str]) -> dict[str, Array]:
        """Return tensors as float32. Raises SettingError if the file has changed since it was opened, or has NaN or infinity."""
        read: dict[str, Array] = {}
        try:
            with open_regular(self.path) as file:
                for key in keys:
                    read[key] = _values(file, self.tensors[key])
                if not self.stamp.holds(file.fileno()):
                    raise ValueError("the file has changed since it was opened: try again")
        except (OSError, ValueError) as error:
            raise SettingError(f"{self.what} {self.path}: {plain(error)}") from error
        for key, values in read.items():
            if not np.isfinite(values).all():
                raise SettingError(f"{self.what} {self.path}: {key:.120}: NaN or infinity: the file is damaged")
        return read


def _values(file: BinaryIO, extent: Extent) -> Array:
    file.seek(extent.offset)
    data = file.read(extent.size)
    if len(data) != extent.size:
        raise ValueError("the file became shorter while it was read")
    values = np.frombuffer(data, _DTYPES[extent.dtype]).reshape(extent.shape)
    if extent.dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # reported as infinity
        return values.astype(np.float32)


def _hashes(file: BinaryIO, start: int) -> tuple[str, str]:
    """Return the SHA-256 of a file and of what follows `start`."""
    file.seek(0)
    whole, data = hashlib.sha256(file.read(start)), hashlib.sha256()
    while piece := file.read(_PIECE):
        whole.update(piece)
        data.update(piece)
    return whole.hexdigest(), data.hexdigest()
