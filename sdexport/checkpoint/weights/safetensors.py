"""The tensors of safetensors files, read one by one.

`sdruntime.adapters.safetensors` describes the format and checks the header.
"""

from __future__ import annotations

import dataclasses
import math
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdexport.errors import ExportError
from sdruntime.adapters.safetensors import header_of
from sdruntime.system.document import open_regular

Array = NDArray[Any]

# safetensors name -> name in NumPy or ml_dtypes
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}

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
    with open_regular(path) as file:
        header = header_of(file)
    tensors = {
        name: StoredTensor(file=path, dtype=extent.dtype, shape=extent.shape, offset=extent.offset, size=extent.size)
        for name, extent in header.tensors.items()
    }
    return tensors, dict(header.metadata)


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
