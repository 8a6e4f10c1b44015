"""The external tensors of an ONNX file, read from its protobuf without the onnx package.

The runtime maps and hashes the data file itself and hands the tensors to ONNX Runtime, which then opens no file at all: what was
checked is what is run, and a path inside a model leads nowhere. The field numbers are those of onnx.proto.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdruntime.backends.ort.protobuf import fields, varints

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
    for field, graph in fields(model):
        if field == _MODEL_GRAPH and isinstance(graph, memoryview):
            for part, tensor in fields(graph):
                if part == _GRAPH_INITIALIZER and isinstance(tensor, memoryview) and (read := _tensor(tensor)):
                    found.append(read)
    return found


def _tensor(message: memoryview) -> ExternalTensor | None:
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
