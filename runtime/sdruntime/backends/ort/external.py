"""The external tensors of an ONNX file, read from its protobuf without the onnx package.

The runtime maps and hashes the data file itself and hands the tensors to ONNX Runtime, which then opens no file at all: what was
checked is what is run, and a path inside a model leads nowhere. The field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_DTYPES = {1: "f4", 2: "u1", 3: "i1", 5: "i2", 6: "i4", 7: "i8", 9: "?", 10: "f2", 11: "f8"}  # TensorProto.DataType
_MODEL_GRAPH, _GRAPH_INITIALIZER = 7, 5
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL_DATA = 1, 2, 8, 13


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalTensor:
    """Where a tensor's bytes lie: `length` bytes from `offset` in the file `location`."""

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int


def external_tensors(model: memoryview) -> list[ExternalTensor]:
    """Every initialiser of the model's graph whose bytes are in another file. Raises ValueError for what is not a sound model."""
    found = []
    for field, graph in _fields(model):
        if field == _MODEL_GRAPH and isinstance(graph, memoryview):
            for part, tensor in _fields(graph):
                if part == _GRAPH_INITIALIZER and isinstance(tensor, memoryview) and (read := _tensor(tensor)):
                    found.append(read)
    return found


def _tensor(message: memoryview) -> ExternalTensor | None:
    dims: list[int] = []
    name, kind, entries = "", 0, {}
    for field, value in _fields(message):
        if field == _DIMS:
            dims += _varints(value) if isinstance(value, memoryview) else [value]
        elif field == _DATA_TYPE and isinstance(value, int):
            kind = value
        elif field == _NAME and isinstance(value, memoryview):
            name = str(value, "utf-8")
        elif field == _EXTERNAL_DATA and isinstance(value, memoryview):
            pair = {number: str(text, "utf-8") for number, text in _fields(value) if isinstance(text, memoryview)}
            entries[pair.get(1, "")] = pair.get(2, "")
    if not entries:
        return None
    if kind not in _DTYPES:
        raise ValueError(f"tensor {name}: element type {kind} cannot lie outside the model here")
    dtype = np.dtype(_DTYPES[kind])
    length = int(np.prod(dims, dtype=np.int64)) * dtype.itemsize
    told = int(entries.get("length", length))
    if told != length:
        raise ValueError(f"tensor {name}: {told} bytes, but its shape {dims} needs {length}")
    return ExternalTensor(
        name=name,
        dtype=dtype,
        shape=tuple(dims),
        location=entries["location"],
        offset=int(entries.get("offset", 0)),
        length=length,
    )


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a protobuf message: an int for numbers, the bytes for everything that has a length."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            size, at = _varint(message, at)
        elif key & 7 in (1, 5):
            size = 8 if key & 7 == 1 else 4
        else:
            raise ValueError(f"not a protobuf message: wire type {key & 7} at byte {at}")
        if at + size > len(message):
            raise ValueError(f"cut short: {size} bytes are missing from byte {at}")
        yield key >> 3, message[at : at + size]
        at += size


def _varints(packed: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(packed):
        value, at = _varint(packed, at)
        values.append(value)
    return values


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte, at = message[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"not a protobuf message: no number at byte {at}")
