"""Turn a graph's optional inputs into required ones, for libraries that would take their defaults as constants.

An optional input of ONNX is an input and an initialiser of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdruntime.backends.onnx_file.graph import graph_fields, name_of_constant, name_of_input, with_graph
from sdruntime.backends.onnx_file.wire import delimited, number

_GRAPH_INITIALIZER, _GRAPH_INPUT = 5, 11
_FLOAT = 1  # TensorProto.DataType
Shape = Sequence[int | str]


def with_required_inputs(model: memoryview, shapes: Mapping[str, Shape]) -> bytes:
    """Return the model with these float32 inputs required, of these shapes. Raises ValueError for a damaged model."""
    if not shapes:
        return bytes(model)
    parts = []
    for part, value in graph_fields(model):
        if part == _GRAPH_INITIALIZER and name_of_constant(value) in shapes:
            continue
        required = part == _GRAPH_INPUT and (name := name_of_input(value)) in shapes
        parts.append(delimited(part, _value_info(name, shapes[name]) if required else value))
    return with_graph(model, parts)


def _value_info(name: str, shape: Shape) -> bytes:
    """Return a ValueInfoProto: name, and type with the tensor's element type and shape."""
    dims = b"".join(delimited(1, delimited(2, dim.encode()) if isinstance(dim, str) else number(1, dim)) for dim in shape)
    return delimited(1, name.encode()) + delimited(2, delimited(1, number(1, _FLOAT) + delimited(2, dims)))
