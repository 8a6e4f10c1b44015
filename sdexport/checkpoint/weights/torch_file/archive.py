"""The format of torch.save since torch 1.6: a zip archive of uncompressed entries.

NAME/data.pkl describes the tensors, NAME/data/KEY holds the bytes of a storage, NAME/byteorder is "little".
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from sdexport.checkpoint.weights.torch_file.inert import read_pickle
from sdexport.checkpoint.weights.torch_file.tensors import Storage
from sdruntime.adapters.safetensors import LONGEST_HEADER
from sdruntime.system.document import open_regular

SIGNATURE = b"PK\x03\x04"
_DATA, _BYTE_ORDER = "data.pkl", "byteorder"
_HEADER = struct.Struct("<4s22xHH")  # of an entry: the signature, and the lengths of the name and of the extra field after it
_ENCRYPTED = 1


class Archive:
    """An open archive. Raises ValueError if it is cut off, damaged, or not one of torch's."""

    def __init__(self, path: Path) -> None:
        self._file = _Bounded(open_regular(path).detach())  # type: ignore[attr-defined]
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self._entries = self._listed()
            described = [name for name in self._entries if name.count("/") == 1 and name.endswith(f"/{_DATA}")]
            if len(described) != 1:
                raise ValueError(f"{len(described)} entries are NAME/{_DATA}: not a file of torch.save")
            self._root = described[0].removesuffix(_DATA)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def value(self) -> Any:
        """Return what the archive's pickle holds."""
        order = self._root + _BYTE_ORDER
        if order in self._entries and (byte_order := self._bytes(order)) != b"little":
            raise ValueError(f"its byte order is {byte_order[:9]!r}: save it on a little-endian machine")
        return read_pickle(self._bytes(self._root + _DATA)).value

    def place(self, storage: Storage) -> int:
        """Return the offset of a storage."""
        offset, size = self._place(f"{self._root}data/{storage.key}")
        if size < storage.size:
            raise ValueError(f"storage {storage.key:.20} has {size:,} bytes, not {storage.size:,}")
        return offset

    def _listed(self) -> dict[str, zipfile.ZipInfo]:
        try:
            with zipfile.ZipFile(self._file) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, struct.error, OSError, OverflowError) as error:
            raise ValueError(f"not a whole zip archive ({error!s:.80}): cut off, or damaged; download it again") from None
        ((name, count),) = Counter(entry.filename for entry in entries).most_common(1) or [("", 0)]
        if count > 1:
            raise ValueError(f"the zip archive has {count:,} entries {name:.60}")
        return {entry.filename: entry for entry in entries}

    def _bytes(self, name: str) -> bytes:
        offset, size = self._place(name)
        if size > LONGEST_HEADER:
            raise ValueError(f"{name:.60} has {size:,} bytes, more than the {LONGEST_HEADER:,} that are read")
        self._file.seek(offset)
        return self._file.read(size)

    def _place(self, name: str) -> tuple[int, int]:
        """Return the offset of an entry's bytes, and their number."""
        entry = self._entries.get(name)
        if entry is None:
            raise ValueError(f"the zip archive has no entry {name:.60}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & _ENCRYPTED:
            raise ValueError(f"the zip archive's entry {name:.60} is compressed or encrypted: torch.save writes neither")
        if entry.header_offset < 0:
            raise ValueError(f"the zip archive's entry {name:.60} begins before the file")
        self._file.seek(entry.header_offset)
        header = self._file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(SIGNATURE):
            raise ValueError(f"the zip archive's entry {name:.60} is damaged")
        _, names, extra = _HEADER.unpack(header)
        offset = entry.header_offset + _HEADER.size + names + extra
        if offset + entry.file_size > self._size:
            raise ValueError(f"the zip archive's entry {name:.60} ends beyond the file: cut off; download it again")
        return offset, entry.file_size


class _Bounded(io.BufferedReader):
    """A file of which not more than a header is read at once: `zipfile` reads as many bytes as the archive says."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LONGEST_HEADER:
            raise ValueError(f"the zip archive's directory has {size:,} bytes, more than the {LONGEST_HEADER:,} that are read")
        return super().read(size)
