"""Read safetensors files: check the header, then read tensors one by one.

The format: eight bytes of header length (little endian), the header as JSON {name: {dtype, shape, data_offsets}}, then the data,
which the tensors cover without gaps or overlaps.
"""

from __future__ import annotations

import dataclasses
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdexport.errors import ExportError
from sdruntime.bundle.records import json_from_text
from sdruntime.system.document import open_regular

Array = NDArray[Any]

# bits per element; types that cannot be exported are listed too, so that they are not reported as damage
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8}
BITS |= {"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64}
BITS |= {"F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
# safetensors name -> name in NumPy or ml_dtypes
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}

LONGEST_HEADER = 16 << 20  # bytes. SDXL's has 230 kB
MOST_TENSORS = 50_000  # SDXL's UNet has 1,680
MOST_AXES, LARGEST_AXIS = 8, 1 << 40

_METADATA = "__metadata__"
_WEIGHT, _SCALE = ".weight", ".scale_weight"
# tensors that do not change a scaled float8 weight: the scale of the layer's input, for products in float8
_HARMLESS = (".scale_input",)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """The location of a tensor: `size` bytes at `offset` in `file`.

    `scale` is a number that multiplies a float8 tensor. `axes` is the order of the axes in the file, outermost first; () is their
    own order.
    """

    file: Path
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    offset: int
    size: int
    scale: StoredTensor | None = None
    axes: tuple[int, ...] = ()

    def rows(self, index: int, of: int) -> StoredTensor:
        """Return part `index` of `of` equal parts along the first axis. Raises ValueError where there are none."""
        if not self.shape or self.shape[0] % of or (self.axes and self.axes[0] != 0):
            order = f" in the order {list(self.axes)}" if self.axes else ""
            raise ValueError(f"a tensor of {list(self.shape)}{order} has no {of} equal parts")
        size, shape = self.size // of, (self.shape[0] // of, *self.shape[1:])
        return dataclasses.replace(self, shape=shape, offset=self.offset + index * size, size=size)

    def reshaped(self, shape: tuple[int, ...]) -> StoredTensor:
        """Return the same values in another shape. Raises ValueError where their numbers or the order of the axes differ."""
        if math.prod(shape) != math.prod(self.shape) or self.axes:
            raise ValueError(f"a tensor of {list(self.shape)} cannot take the shape {list(shape)}")
        return dataclasses.replace(self, shape=shape)

    def transposed(self) -> StoredTensor:
        """Return a matrix with its axes exchanged."""
        return dataclasses.replace(self, shape=self.shape[::-1], axes=() if self.axes else (1, 0))

    @property
    def readable(self) -> bool:
        return self.dtype in _FLOATS or self.dtype in _FLOAT8

    def read(self) -> Array:
        """Return the values in their stored type (bfloat16 as in ml_dtypes); float8 is converted to float32."""
        import ml_dtypes

        kind = np.dtype(getattr(ml_dtypes, (_FLOATS | _FLOAT8)[self.dtype], _FLOATS.get(self.dtype)))
        values = np.empty([self.shape[axis] for axis in self.axes] if self.axes else self.shape, kind)
        with self.file.open("rb") as file:
            file.seek(self.offset)
            if self.size and file.readinto(values.reshape(-1).view(np.uint8).data) != self.size:
                raise ExportError(f"{self.file}: became shorter while it was read")
        if self.dtype in _FLOAT8:
            values = values.astype(np.float32)
        if self.scale is not None:
            values *= self.scale.read().astype(np.float32).reshape(())
        return np.ascontiguousarray(values.transpose(np.argsort(self.axes))) if self.axes else values


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name. Raises ValueError if it is truncated, damaged or of another format."""
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors of a safetensors file, and its metadata, as `modelspec.*` (https://github.com/Stability-AI/ModelSpec).

    Raises ValueError as `read_header` does.
    """
    header, start, total = _header(path)
    metadata = header.pop(_METADATA, None)
    try:
        if len(header) > MOST_TENSORS:
            raise ValueError(f"{len(header):,} tensors, more than the {MOST_TENSORS:,} that are read")
        tensors = {name: _stored(path, name, start, entry) for name, entry in header.items()}
        end = _checked_end(tensors, start)
    except ValueError as error:
        raise ValueError(f"the safetensors header is damaged ({error})") from None
    if end != total:
        raise ValueError(f"{total:,} bytes, but its header requires {end:,}: cut off, or damaged; download it again")
    entries = metadata.items() if isinstance(metadata, dict) else ()
    return tensors, {key: value for key, value in entries if isinstance(value, str)}


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return a file's header, the offset of its data, and its size."""
    with open_regular(path) as file:
        total = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or length > total - 8:
            raise ValueError(f"not a whole safetensors file ({total:,} bytes)")
        if length > LONGEST_HEADER:
            raise ValueError(f"the safetensors header has {length:,} bytes, more than the {LONGEST_HEADER:,} that are read")
        text = file.read(length)
    try:
        header = json_from_text(text.decode("utf-8"))
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise ValueError(f"the safetensors header is damaged ({error})") from None
    return header, 8 + length, total


def is_regular(path: Path) -> bool:
    """Return whether a path leads to a regular file, not to a folder, pipe or device."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def with_scales(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors of a network, with each `X.scale_weight` attached to its float8 `X.weight` as `scale`.

    This is the layout of "scaled fp8" files: weight = float32(stored) * scale_weight. Raises ValueError for a scale of another
    name or shape, as its meaning would be a guess.
    """
    tensors = dict(stored)
    float8 = {name.removesuffix(_WEIGHT) for name, tensor in stored.items() if name.endswith(_WEIGHT) and tensor.dtype in _FLOAT8}
    for name in stored:
        owner, _, last = name.rpartition(".")
        if "scale" not in last or name.endswith(_HARMLESS):
            continue
        if name.endswith(_SCALE):
            scale = tensors.pop(name)
            if owner not in float8 or not scale.readable or math.prod(scale.shape) != 1:
                raise ValueError(
                    f"{name:.60} {scale.dtype} {list(scale.shape)}: only a single number for a float8 weight is supported"
                )
            tensors[owner + _WEIGHT] = dataclasses.replace(stored[owner + _WEIGHT], scale=scale)
        elif owner in float8:
            raise ValueError(f"{name:.60}: float8 weights with scales of this layout are not supported")
    return tensors


def _stored(path: Path, name: str, start: int, entry: Any) -> StoredTensor:
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
    return StoredTensor(file=path, dtype=dtype, shape=tuple(shape), offset=start + first, size=last - first)


def _are_sizes(sizes: Any) -> bool:
    return isinstance(sizes, list) and all(type(size) is int and 0 <= size <= LARGEST_AXIS for size in sizes)


def _checked_end(tensors: Mapping[str, StoredTensor], start: int) -> int:
    """Return the offset at which the last tensor ends. Raises ValueError if tensors overlap or leave a gap."""
    end = start
    for name, tensor in sorted(tensors.items(), key=_place):
        if tensor.offset != end:
            fault = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap before it"
            raise ValueError(f"{name:.60}: {fault}")
        end += tensor.size
    return end


def _place(item: tuple[str, StoredTensor]) -> tuple[int, int]:
    return item[1].offset, item[1].size


def merge_shards(files: Iterable[tuple[Path, Mapping[str, StoredTensor]]]) -> dict[str, StoredTensor]:
    """Return the tensors of all shards of a network. Raises ValueError if two shards hold a tensor of the same name."""
    merged: dict[str, StoredTensor] = {}
    for path, tensors in files:
        duplicates = merged.keys() & tensors.keys()
        if duplicates:
            name = min(duplicates)
            raise ValueError(f"{path.name} and {merged[name].file.name} both hold {name:.60}")
        merged |= tensors
    return with_scales(merged)
