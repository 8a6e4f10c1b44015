"""From the pickle of a state dict to the locations of its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdexport.checkpoint.weights.safetensors import StoredTensor
from sdexport.checkpoint.weights.torch_file.inert import Call, Name, Persistent, kind_of
from sdruntime.adapters.safetensors import BITS, LARGEST_AXIS, MOST_AXES, MOST_TENSORS

_STATE_DICT = "state_dict"  # where the checkpoints of a training keep it
# names of torch -> safetensors' names of the types
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}
_DTYPES |= {"float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}
_DTYPES |= {"uint16": "U16", "uint32": "U32", "uint64": "U64"}
_STORAGES = {"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64"}
_STORAGES |= {"IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL"}
_STORAGES |= {"ComplexFloatStorage": "C64", "storage.UntypedStorage": "U8", "UntypedStorage": "U8"}
_TENSOR, _UNTYPED = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """A row of numbers, of which tensors are views."""

    dtype: str
    key: str
    count: int

    @property
    def size(self) -> int:
        return self.count * BITS[self.dtype] // 8


Place = Callable[[Storage], int]  # the offset of a storage in the file; raises ValueError if it does not lie there as a whole


def storage_of(reference: Any) -> Storage:
    """Return the storage that a reference names. Raises ValueError for another reference, or a storage of an unknown type."""
    entries = reference.id if isinstance(reference, Persistent) and isinstance(reference.id, tuple) else ()
    # torch before 1.6 adds a sixth entry: which part of another storage this one is, or None
    if not 5 <= len(entries) <= 6 or entries[0] != "storage" or entries[5:] not in ((), (None,)):
        raise ValueError("a reference to something else than a storage")
    _, kind, key, _, count = entries[:5]
    dtype = _STORAGES.get(kind.name.removeprefix("torch.")) if isinstance(kind, Name) else None
    if dtype is None:
        raise ValueError(f"stored as {kind_of(kind)}, which is not supported")
    if not isinstance(key, str) or not _is_size(count):
        raise ValueError("its storage has no name or no size")
    return Storage(dtype=dtype, key=key, count=count)


def stored_tensors(value: Any, path: Path, place: Place) -> dict[str, StoredTensor]:
    """Return the tensors of a state dict by name, or of the state dict in the entry `state_dict`.

    Raises ValueError for anything else, and for a tensor that is not a dense view of its storage.
    """
    if isinstance(value, dict) and isinstance(value.get(_STATE_DICT), dict):
        value = value[_STATE_DICT]
    if not isinstance(value, dict):
        raise ValueError(f"a {kind_of(value)}, not a state dict of tensors by name")
    if len(value) > MOST_TENSORS:
        raise ValueError(f"{len(value):,} tensors, more than the {MOST_TENSORS:,} that are read")
    tensors, faults = {}, []
    for name, entry in value.items():
        try:
            if not isinstance(name, str):
                raise ValueError("its name is not text")
            tensors[name] = _tensor(entry, path, place)
        except ValueError as error:
            shown = name if isinstance(name, str | int) else kind_of(name)
            faults.append(f"{shown!r:.60}: {error}")
    if faults or not tensors:
        faults = [*faults[:_SHOWN], f"{len(tensors):,} of {len(value):,} entries are tensors by name"]
        raise ValueError("; ".join(faults))
    return tensors


def axes_in_file(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return the order of a dense tensor's axes in the file: () if that is their own. Raises ValueError for other strides."""
    if not math.prod(shape):
        return ()
    moving = [axis for axis, size in enumerate(shape) if size > 1]
    order = sorted(moving, key=lambda axis: -strides[axis])
    step = 1
    for axis in reversed(order):
        if strides[axis] != step:
            raise ValueError(f"shape {list(shape)} with strides {list(strides)} is not dense: save a copy made by .contiguous()")
        step *= shape[axis]
    return () if order == moving else (*order, *(axis for axis in range(len(shape)) if axis not in moving))


def _tensor(entry: Any, path: Path, place: Place) -> StoredTensor:
    for _ in range(2):  # the data of a parameter is a tensor
        if isinstance(entry, Call) and entry.name in _PARAMETERS and isinstance(entry.arguments, tuple) and entry.arguments:
            entry = entry.arguments[0]
    if not isinstance(entry, Call) or entry.name not in (_TENSOR, _UNTYPED) or not isinstance(entry.arguments, tuple):
        raise ValueError(f"a {kind_of(entry)}, not a plain tensor")
    untyped = entry.name == _UNTYPED
    first, more = entry.arguments[:4], entry.arguments[6:]
    if len(first) < 4 or (untyped and not more):
        raise ValueError("a tensor without its storage, shape or type")
    storage = storage_of(first[0])
    dtype = _dtype_of(more[0]) if untyped else storage.dtype
    if any(more[untyped:]):
        raise ValueError("a tensor whose conjugate or negation is meant")
    offset, shape, strides = first[1:]
    if not _is_size(offset) or not _are_sizes(shape) or not _are_sizes(strides) or len(shape) != len(strides):
        raise ValueError("a tensor of an invalid offset, shape or strides")
    axes = axes_in_file(shape, strides)
    width = BITS[dtype] // 8
    size, start = math.prod(shape) * width, offset * width
    if start + size > storage.size:
        raise ValueError(f"{dtype} {list(shape)} from byte {start:,} ends beyond its storage of {storage.size:,} bytes")
    return StoredTensor(file=path, dtype=dtype, shape=shape, offset=place(storage) + start, size=size, axes=axes)


def _dtype_of(name: Any) -> str:
    dtype = _DTYPES.get(name.name.removeprefix("torch.")) if isinstance(name, Name) else None
    if dtype is None:
        raise ValueError(f"stored as {kind_of(name)}, which is not supported")
    return dtype


def _is_size(size: Any) -> bool:
    return type(size) is int and 0 <= size <= LARGEST_AXIS


def _are_sizes(sizes: Any) -> bool:
    return isinstance(sizes, tuple) and len(sizes) <= MOST_AXES and all(map(_is_size, sizes))
