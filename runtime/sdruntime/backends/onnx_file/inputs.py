"""Turn a graph's optional inputs into required ones, for libraries that would take their defaults as constants.

An optional input of ONNX is an input and an initialiser of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdruntime.backends.onnx_file.graph import name_of_constant, name_of_input
from sdruntime.backends.onnx_file.wire import delimited, fields, number

_MODEL_GRAPH = 7
_GRAPH_INITIALIZER, _GRAPH_INPUT = 5, 11
_FLOAT = 1  # TensorProto.DataType
Shape = Sequence[int | str]


def with_required_inputs(model: memoryview, shapes: Mapping[str, Shape]) -> bytes:
    """Return the model with these float32 inputs required, of these shapes. Raises ValueError for a damaged model."""
    if not shapes:
        return bytes(model)
    parts = []
    for part, value in fields(model):
        if isinstance(value, int):
            parts.append(number(part, value))
        else:
            parts.append(delimited(part, _graph(value, shapes) if part == _MODEL_GRAPH else value))
    return b"".join(parts)


def _graph(graph: memoryview, shapes: Mapping[str, Shape]) -> bytes:
    parts = []
    for part, value in fields(graph):
        assert not isinstance(value, int)  # GraphProto has no number
        if part == _GRAPH_INITIALIZER and name_of_constant(value) in shapes:
            continue
        if part == _GRAPH_INPUT and (name := name_of_input(value)) in shapes:
            value = memoryview(_value_info(name, shapes[name]))
        parts.append(delimited(part, value))
    return b"".join(parts)


def _value_info(name: str, shape: Shape) -> bytes:
    """Return a ValueInfoProto: name, and type with the tensor's element type and shape."""
    dims = b"".join(delimited(1, delimited(2, dim.encode()) if isinstance(dim, str) else number(1, dim)) for dim in shape)
    return delimited(1, name.encode()) + delimited(2, delimited(1, number(1, _FLOAT) + delimited(2, dims)))
