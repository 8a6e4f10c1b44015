"""Read an ONNX graph, replace some of its nodes, and write it, without the onnx package.

Everything else is preserved byte for byte. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.onnx_file.wire import delimited, fields, float32, number, varints

_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_NAME, _GRAPH_INITIALIZER, _GRAPH_OUTPUT = 1, 2, 5, 12
_INPUT, _OUTPUT, _NAME, _OP, _ATTRIBUTE, _DOMAIN = 1, 2, 3, 4, 5, 7  # of NodeProto
_FLOAT, _INT, _STRING, _GRAPH, _INTS = 1, 2, 3, 5, 7  # AttributeProto.type
_DIMS, _TYPE, _FLOATS, _INT64S, _TENSOR_NAME, _RAW = 1, 2, 4, 7, 8, 9  # of TensorProto
_OF_TYPE = {1: "<f4", 7: "<i8"}  # TensorProto.data_type -> dtype, of constants that are read

Attribute = int | float | str | list[int] | bytes  # bytes: a subgraph, from `make_branch`


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A NodeProto: its tensors, its attributes by name and type, and its serialized bytes.

    `inputs` also has, after the node's own, all tensors that nodes of its subgraphs read.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ints: Mapping[str, list[int]]  # INT and INTS attributes
    floats: Mapping[str, float]
    texts: Mapping[str, str]
    raw: bytes | memoryview


@dataclass(slots=True, kw_only=True)
class Graph:
    """A graph's nodes, constants and outputs, and which nodes produce and consume each tensor."""

    nodes: list[Node]
    constants: dict[str, list[int] | list[float]]  # int64 and float32 initializers stored in the file itself
    outputs: set[str]
    makers: dict[str, Node] = field(init=False)
    readers: dict[str, list[Node]] = field(init=False)

    def __post_init__(self) -> None:
        self.makers = {name: node for node in self.nodes for name in node.outputs}
        self.readers = {}
        for node in self.nodes:
            for name in node.inputs:
                self.readers.setdefault(name, []).append(node)

    def maker(self, name: str, op: str) -> Node | None:
        """Return the node that produces a tensor, if its operator is `op`."""
        node = self.makers.get(name)
        return node if node is not None and node.op == op else None

    def reader(self, name: str, op: str) -> Node | None:
        """Return the only node that reads a tensor, if its operator is `op` and the tensor is not an output of the graph."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and readers[0].op == op and name not in self.outputs else None


def read_graph(model: memoryview) -> Graph:
    """Return the graph of a model. Raises ValueError for a damaged one."""
    nodes: list[Node] = []
    constants: dict[str, list[int] | list[float]] = {}
    outputs: set[str] = set()
    for part, value in graph_fields(model):
        if part == _GRAPH_NODE:
            nodes.append(_read_node(value))
        elif part == _GRAPH_INITIALIZER:
            name, numbers = _read_constant(value)
            if numbers is not None:
                constants[name] = numbers
        elif part == _GRAPH_OUTPUT:
            outputs.add(name_of_input(value))
    return Graph(nodes=nodes, constants=constants, outputs=outputs)


def make_node(
    op: str, inputs: Sequence[str], output: str, attributes: Mapping[str, Attribute] | None = None, *, domain: str = ""
) -> Node:
    """Return a new node, named like its output."""
    attributes = attributes or {}
    raw = [delimited(_INPUT, name.encode()) for name in inputs]
    raw += [delimited(_OUTPUT, output.encode()), delimited(_NAME, output.encode()), delimited(_OP, op.encode())]
    raw += [delimited(_ATTRIBUTE, _attribute(name, value)) for name, value in attributes.items()]
    raw += [delimited(_DOMAIN, domain.encode())] if domain else []
    return _read_node(memoryview(b"".join(raw)))


def make_branch(nodes: Sequence[Node], output: str) -> bytes:
    """Return a subgraph without inputs for an attribute of If; its nodes may read the tensors of the graph around it."""
    parts = [*(delimited(_GRAPH_NODE, node.raw) for node in nodes), delimited(_GRAPH_NAME, output.encode())]
    return b"".join([*parts, delimited(_GRAPH_OUTPUT, delimited(1, output.encode()))])


def write_graph(model: memoryview, graph: Graph, replaced: Mapping[int, Sequence[Node]], constants: Mapping[str, Array]) -> bytes:
    """Return the model with some nodes replaced and constants added, without nodes and constants that no output depends on.

    `replaced`: the `id` of a node -> the nodes to insert instead. `constants`: int64 or float32 arrays.
    """
    nodes = _needed([new for node in graph.nodes for new in replaced.get(id(node), [node])], graph.outputs)
    read = {name for node in nodes for name in node.inputs}
    parts = [delimited(_GRAPH_NODE, node.raw) for node in nodes]
    for part, value in graph_fields(model):
        if part != _GRAPH_NODE and not (part == _GRAPH_INITIALIZER and _read_constant(value)[0] not in read):
            parts.append(delimited(part, value))
    parts += [delimited(_GRAPH_INITIALIZER, _constant(name, values)) for name, values in constants.items() if name in read]
    return with_graph(model, parts)


def with_graph(model: memoryview, parts: Iterable[bytes]) -> bytes:
    """Return the model with the serialized fields `parts` as its graph."""
    others = [(part, value) for part, value in fields(model) if part != _MODEL_GRAPH]
    head = [number(part, value) if isinstance(value, int) else delimited(part, value) for part, value in others]
    return b"".join([*head, delimited(_MODEL_GRAPH, b"".join(parts))])


def _needed(nodes: list[Node], outputs: Iterable[str]) -> list[Node]:
    """Return the nodes that the outputs depend on, in their order."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed.intersection(node.outputs):
            needed.update(node.inputs)
            kept.append(node)
    return kept[::-1]


def graph_fields(model: memoryview) -> list[tuple[int, memoryview]]:
    """Return the fields of a model's graph, by their numbers. Raises ValueError for a damaged model."""
    graphs = [value for part, value in fields(model) if part == _MODEL_GRAPH and not isinstance(value, int)]
    return [(part, value) for graph in graphs for part, value in fields(graph) if not isinstance(value, int)]


def _read_node(message: memoryview) -> Node:
    names: dict[int, list[str]] = {_INPUT: [], _OUTPUT: [], _OP: []}
    ints: dict[str, list[int]] = {}
    floats: dict[str, float] = {}
    texts: dict[str, str] = {}
    captured: list[str] = []
    for part, value in fields(message):
        if part in names and isinstance(value, memoryview):
            names[part].append(str(value, "utf-8"))
        elif part == _ATTRIBUTE and isinstance(value, memoryview):
            attribute = list(fields(value))
            name = next(str(text, "utf-8") for at, text in attribute if at == 1 and isinstance(text, memoryview))
            captured += [
                name for at, branch in attribute if at in (6, 11) and not isinstance(branch, int) for name in _read_by(branch)
            ]
            numbers = [integer for at, packed in attribute if at in (3, 8) for integer in _ints(packed)]
            ints |= {name: numbers} if numbers else {}
            for at, content in attribute:
                if at == 2 and isinstance(content, memoryview):
                    floats[name] = struct.unpack("<f", content)[0]
                elif at == 4 and isinstance(content, memoryview):
                    texts[name] = str(content, "utf-8", "replace")
    return Node(
        op=names[_OP][0],
        inputs=(*names[_INPUT], *captured),
        outputs=tuple(names[_OUTPUT]),
        ints=ints,
        floats=floats,
        texts=texts,
        raw=message,
    )


def _read_by(branch: memoryview) -> list[str]:
    """Return the tensors that the nodes of a subgraph read, its outputs too, which may be tensors of the graph around it."""
    names: list[str] = []
    for part, value in fields(branch):
        if part == _GRAPH_NODE and not isinstance(value, int):
            names += _read_node(value).inputs
        elif part == _GRAPH_OUTPUT and not isinstance(value, int):
            names.append(name_of_input(value))
    return names


def name_of_input(message: memoryview) -> str:
    """Return the name of a ValueInfoProto: an input or output."""
    return next(str(text, "utf-8") for number, text in fields(message) if number == 1 and not isinstance(text, int))


def _attribute(name: str, value: Attribute) -> bytes:
    named = delimited(1, name.encode())
    if isinstance(value, str):
        return named + delimited(4, value.encode()) + number(20, _STRING)
    if isinstance(value, float):
        return named + float32(2, value) + number(20, _FLOAT)
    if isinstance(value, bytes):
        return named + delimited(6, value) + number(20, _GRAPH)
    if isinstance(value, int):
        return named + number(3, value) + number(20, _INT)
    return named + b"".join(number(8, integer) for integer in value) + number(20, _INTS)


def _read_constant(message: memoryview) -> tuple[str, list[int] | list[float] | None]:
    """Return a tensor's name and its values, or None for the values if their type is not read or they are in another file."""
    name, kind, typed, raw = "", 0, bytearray(), None
    for part, value in fields(message):
        if part == _TENSOR_NAME and isinstance(value, memoryview):
            name = str(value, "utf-8")
        elif part == _TYPE and isinstance(value, int):
            kind = value
        elif part == _RAW and isinstance(value, memoryview):
            raw = value
        elif part == _FLOATS and isinstance(value, memoryview):
            typed += value
        elif part == _INT64S:
            typed += b"".join(struct.pack("<q", integer) for integer in _ints(value))
    data = raw if raw is not None else typed or None
    if kind not in _OF_TYPE or data is None or len(data) % np.dtype(_OF_TYPE[kind]).itemsize:
        return name, None
    return name, np.frombuffer(data, _OF_TYPE[kind]).tolist()


def name_of_constant(message: memoryview) -> str:
    """Return the name of a TensorProto."""
    return next((str(text, "utf-8") for part, text in fields(message) if part == _TENSOR_NAME and not isinstance(text, int)), "")


def _ints(part: int | memoryview) -> list[int]:
    """Return the int64 values of a field, packed or not."""
    return [value - (1 << 64) if value >> 63 else value for value in ([part] if isinstance(part, int) else varints(part))]


def _constant(name: str, values: Array) -> bytes:
    kind = next(kind for kind, dtype in _OF_TYPE.items() if values.dtype == dtype)
    dims = b"".join(number(_DIMS, size) for size in values.shape)
    return dims + number(_TYPE, kind) + delimited(_TENSOR_NAME, name.encode()) + delimited(_RAW, values.tobytes())
