"""Read an untrusted .npz file: the sizes in its headers are checked before anything is unpacked.

NumPy's own reader allocates whatever size a header states, and a zip file of two megabytes may unpack to gigabytes.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = 16 << 20  # bytes, unpacked. A bundle's reference outputs have 1 MB
_HEADER = re.compile(rb"\{'descr': '([<|][fiub]\d)', 'fortran_order': False, 'shape': \(([\d, ]{0,200})\), \}\s*")
_NOT_A_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, OSError, IndexError)


def read_npz(data: bytes | memoryview, *, most: int = LARGEST) -> dict[str, NDArray[Any]]:
    """Return the arrays by name: plain numbers, as `numpy.savez` and `savez_compressed` write them.

    Raises ValueError for anything else, and for more than `most` bytes together.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            members = packed.infolist()
            size = sum(member.file_size for member in members)
            if size > most:
                raise ValueError(f"{size:,} bytes unpacked; at most {most:,} are read")
            return {_name(member): _array(packed, member) for member in members}
    except _NOT_A_ZIP as error:
        raise ValueError(f"not a whole zip file: {error}") from error


def _name(member: zipfile.ZipInfo) -> str:
    name, dot, ending = member.filename.rpartition(".")
    if dot + ending != ".npy" or member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename!r:.100}: not an array as NumPy writes it")
    return name


def _array(packed: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    with packed.open(member) as file:
        data = file.read(member.file_size)  # without the size, more than the stated size could be unpacked
    where = f"{member.filename!r:.100}"
    if data[:8] != b"\x93NUMPY\x01\x00" or len(data) < 10:
        raise ValueError(f"{where}: not an array as NumPy writes it")
    start = 10 + int.from_bytes(data[8:10], "little")
    header = _HEADER.fullmatch(data[10:start])
    if header is None:
        raise ValueError(f"{where}: its header is damaged, or it does not hold plain numbers")
    try:
        kind, shape = np.dtype(header[1].decode()), tuple(int(part) for part in header[2].decode().split(",") if part.strip())
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error
    if max(shape, default=0) > len(data) or math.prod(shape) * kind.itemsize != len(data) - start:
        raise ValueError(f"{where}: expected {kind} {list(shape)}, got {len(data) - start:,} bytes")
    return np.frombuffer(data, kind, offset=start).reshape(shape)
