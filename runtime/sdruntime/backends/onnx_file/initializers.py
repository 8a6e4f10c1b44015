"""The initializers of a model's main graph: their types and shapes, and new values for those stored in the file itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.onnx_file.external import DTYPES
from sdruntime.backends.onnx_file.graph import graph_fields, with_graph
from sdruntime.backends.onnx_file.wire import delimited, fields, number, varints

_INITIALIZER = 5  # of GraphProto
_DIMS, _TYPE, _NAME, _RAW, _LOCATION = 1, 2, 8, 9, 14  # of TensorProto


@dataclass(frozen=True, slots=True, kw_only=True)
class Initializer:
    """The type and shape of an initializer. `kind`: TensorProto.DataType; `external`: its bytes are in another file."""

    kind: int
    shape: tuple[int, ...]
    external: bool

    @property
    def dtype(self) -> np.dtype[np.generic] | None:
        """The type as NumPy has it (uint16 for bfloat16), None for others."""
        return np.dtype(DTYPES[self.kind]) if self.kind in DTYPES else None


def initializers(model: memoryview) -> dict[str, Initializer]:
    """Return the initializers of the main graph by name. Raises ValueError for a damaged model."""
    return dict(_described(value) for part, value in graph_fields(model) if part == _INITIALIZER)


def with_values(model: memoryview, values: Mapping[str, Array]) -> bytes:
    """Return the model with new values, stored as they are, for some initializers in the file itself."""
    parts = []
    for part, value in graph_fields(model):
        name, known = _described(value) if part == _INITIALIZER else ("", None)
        if known is not None and name in values:
            dims = b"".join(number(_DIMS, size) for size in known.shape)
            tensor = dims + number(_TYPE, known.kind) + delimited(_NAME, name.encode())
            parts.append(delimited(part, tensor + delimited(_RAW, values[name].tobytes())))
        else:
            parts.append(delimited(part, value))
    return with_graph(model, parts)


def _described(tensor: memoryview) -> tuple[str, Initializer]:
    dims: list[int] = []
    name, kind, external = "", 0, False
    for part, value in fields(tensor):
        if part == _DIMS:
            dims += varints(value) if isinstance(value, memoryview) else [value]
        elif part == _TYPE and isinstance(value, int):
            kind = value
        elif part == _NAME and isinstance(value, memoryview):
            name = str(value, "utf-8")
        elif part == _LOCATION and isinstance(value, int):
            external = value != 0
    return name, Initializer(kind=kind, shape=tuple(dims), external=external)
