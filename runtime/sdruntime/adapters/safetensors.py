"""The header of a safetensors file, checked: where each tensor is, before any of them is read.

The format: eight bytes of header length (little endian), the header as JSON {name: {dtype, shape, data_offsets}}, then the data,
which the tensors cover without gaps or overlaps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from sdruntime.bundle.records import json_from_text

# bits per element; types that cannot be used are listed too, so that they are not reported as damage
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8}
BITS |= {"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64}
BITS |= {"F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}

LONGEST_HEADER = 16 << 20  # bytes. SDXL's has 230 kB
MOST_TENSORS = 50_000  # SDXL's UNet has 1,680
MOST_AXES, LARGEST_AXIS = 8, 1 << 40

_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The location of a tensor: `size` bytes at `offset` in its file."""

    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The tensors of a file by name, its metadata, such as `modelspec.*` (https://github.com/Stability-AI/ModelSpec), and the
    offset at which the data begins."""

    tensors: Mapping[str, Extent]
    metadata: Mapping[str, str]
    start: int


def header_of(file: BinaryIO) -> Header:
    """Return the header of an open file. Raises ValueError if the file is truncated, damaged or of another format."""
    header, start, total = _read(file)
    metadata = header.pop(_METADATA, None)
    try:
        if len(header) > MOST_TENSORS:
            raise ValueError(f"{len(header):,} tensors, more than the {MOST_TENSORS:,} that are read")
        tensors = {name: _extent(name, start, entry) for name, entry in header.items()}
        end = _checked_end(tensors, start)
    except ValueError as error:
        raise ValueError(f"the safetensors header is damaged ({error})") from None
    if end != total:
        raise ValueError(f"{total:,} bytes, but its header requires {end:,}: cut off, or damaged; download it again")
    entries = metadata.items() if isinstance(metadata, dict) else ()
    return Header(tensors=tensors, metadata={key: text for key, text in entries if isinstance(text, str)}, start=start)


def _read(file: BinaryIO) -> tuple[dict[str, Any], int, int]:
    """Return a file's header, the offset of its data, and its size."""
    total = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if total < 8 or length > total - 8:
        raise ValueError(f"not a whole safetensors file ({total:,} bytes)")
    if length > LONGEST_HEADER:
        raise ValueError(f"the safetensors header has {length:,} bytes, more than the {LONGEST_HEADER:,} that are read")
    try:
        header = json_from_text(file.read(length).decode("utf-8"))
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise ValueError(f"the safetensors header is damaged ({error})") from None
    return header, 8 + length, total


def _extent(name: str, start: int, entry: Any) -> Extent:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name:.60}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name:.60}: unknown dtype {dtype!r:.40}")
    if not _are_sizes(shape) or len(shape) > MOST_AXES:
        raise ValueError(f"{name:.60}: invalid shape {shape!r:.40}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name:.60}: invalid data_offsets {offsets!r:.40}")
    first, last = offsets
    if (last - first) * 8 != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"{name:.60}: {last - first} bytes do not fit the shape {shape!r:.40} of {dtype}")
    return Extent(dtype=dtype, shape=tuple(shape), offset=start + first, size=last - first)


def _are_sizes(sizes: Any) -> bool:
    return isinstance(sizes, list) and all(type(size) is int and 0 <= size <= LARGEST_AXIS for size in sizes)


def _checked_end(tensors: Mapping[str, Extent], start: int) -> int:
    """Return the offset at which the last tensor ends. Raises ValueError if tensors overlap or leave a gap."""
    end = start
    for name, tensor in sorted(tensors.items(), key=_place):
        if tensor.offset != end:
            fault = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap before it"
            raise ValueError(f"{name:.60}: {fault}")
        end += tensor.size
    return end


def _place(item: tuple[str, Extent]) -> tuple[int, int]:
    return item[1].offset, item[1].size
