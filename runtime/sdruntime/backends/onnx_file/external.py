"""External tensors of an ONNX file (tensors whose bytes are in another file), read from its protobuf without the onnx package.

Engine libraries open any file that a tensor names, relative to the model's folder or, for a model in memory, to the current
directory. So every place in a model that may hold a tensor is checked: only weights of the main graph may be external, in a file
that the manifest lists. The runtime maps and hashes that file and passes the tensors to the library. Field numbers are those of
onnx.proto.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from sdruntime.backends.onnx_file.wire import fields, varints

DTYPES = {1: "f4", 2: "u1", 3: "i1", 5: "i2", 6: "i4", 7: "i8", 9: "?", 10: "f2", 11: "f8", 16: "u2"}  # TensorProto.DataType
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL_DATA, _DATA_LOCATION = 1, 2, 8, 13, 14
_MODEL, _TENSOR = "ModelProto", "TensorProto"
# message type: field -> type of the message in it, for all fields that can lead to a tensor
_MESSAGES: Mapping[str, Mapping[int, str]] = {
    _MODEL: {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "GraphProto": {1: "NodeProto", 5: _TENSOR, 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: _TENSOR,
        6: "GraphProto",
        10: _TENSOR,
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: _TENSOR, 2: _TENSOR},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
}
_MOST_AXES = 64  # of a tensor: bounds the size of the product of its dimensions
_DEPTH = 40  # nested messages; protobuf itself allows 100
_WEIGHTS = (_MODEL, "GraphProto", _TENSOR)  # path to the initializers of the main graph


def locations(files: Sequence[str]) -> dict[str, str]:
    """Map the locations that a model (the first of `files`) uses for its data files to their paths in the bundle."""
    folder = PurePosixPath(files[0]).parent
    below = [PurePosixPath(path) for path in files[1:] if PurePosixPath(path).is_relative_to(folder)]
    return {path.relative_to(folder).as_posix(): path.as_posix() for path in below}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalTensor:
    """The location of a tensor's data: `length` bytes at `offset` in the file `location`.

    `kind` is its TensorProto.DataType. NumPy has no bfloat16, whose `dtype` is uint16: the raw bits.
    """

    name: str
    kind: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int


def external_tensors(model: memoryview, files: Collection[str]) -> list[ExternalTensor]:
    """Return the weights of the main graph that are stored in other files, each of which must be one of `files`.

    Raises ValueError for an external tensor elsewhere in the model (a constant, a branch, a function, a sparse tensor), for a
    file that is not in `files`, and for a damaged model.
    """
    return [_checked(path, tensor, files) for path, tensor in _tensors(model, (_MODEL,)) if _is_external(tensor)]


def _tensors(message: memoryview, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], memoryview]]:
    """Yield every tensor below a message, with the types of the messages on the path to it."""
    nested = _MESSAGES[path[-1]]
    if len(path) > _DEPTH:
        raise ValueError(f"more than {_DEPTH} nested messages")
    for field, value in fields(message):
        if field in nested and isinstance(value, memoryview):
            if nested[field] == _TENSOR:
                yield (*path, _TENSOR), value
            else:
                yield from _tensors(value, (*path, nested[field]))


def _is_external(tensor: memoryview) -> bool:
    return any(field == _EXTERNAL_DATA or (field == _DATA_LOCATION and value != 0) for field, value in fields(tensor))


def _checked(path: tuple[str, ...], message: memoryview, files: Collection[str]) -> ExternalTensor:
    """Parse and check an external tensor. Raises ValueError."""
    dims: list[int] = []
    name, kind, entries = "", 0, {}
    for field, value in fields(message):
        if field == _DIMS:
            dims += varints(value) if isinstance(value, memoryview) else [value]
        elif field == _DATA_TYPE and isinstance(value, int):
            kind = value
        elif field == _NAME and isinstance(value, memoryview):
            name = str(value, "utf-8")
        elif field == _EXTERNAL_DATA and isinstance(value, memoryview):
            pair = {number: str(text, "utf-8") for number, text in fields(value) if isinstance(text, memoryview)}
            entries[pair.get(1, "")] = pair.get(2, "")
    location = entries.get("location", "")
    if path != _WEIGHTS:
        where = next((part for part in path[1:] if part not in ("GraphProto", "NodeProto", "AttributeProto")), "a node")
        raise ValueError(f"tensor {name!r}: its bytes are in another file ({location!r}), which is not allowed in {where}")
    if location not in files:
        raise ValueError(f"refers to {location!r}, which the manifest does not list for it")
    if kind not in DTYPES:
        raise ValueError(f"tensor {name!r}: element type {kind} is not supported in another file")
    if len(dims) > _MOST_AXES:
        raise ValueError(f"tensor {name!r:.60}: {len(dims):,} axes, above {_MOST_AXES}")
    dtype = np.dtype(DTYPES[kind])
    length = math.prod(dims) * dtype.itemsize
    stored, offset = _number(entries, "length", length), _number(entries, "offset", 0)
    if stored != length:
        raise ValueError(f"tensor {name!r}: {stored} bytes, but its shape {dims} needs {length}")
    return ExternalTensor(name=name, kind=kind, dtype=dtype, shape=tuple(dims), location=location, offset=offset, length=length)


def _number(entries: Mapping[str, str], key: str, default: int) -> int:
    text = entries.get(key, "")
    if text and not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise ValueError(f"{key} {text[:40]!r} is not a number of bytes")
    return int(text) if text else default
