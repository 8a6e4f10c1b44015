"""Attention as one node of ONNX Runtime's own, in the graph that its optimiser has saved.

The export writes attention as products around a Softmax, so that any library can read it. ONNX Runtime's CPU kernel of
MultiHeadAttention goes over it in blocks that fit the cache (Dao et al. 2022, FlashAttention) and never holds the scores, 1.1 GB
for two rows of a UNet at 64x64 latents.

    Softmax(alpha * q @ k^T) @ v, with q, k and v split into heads and the heads joined again
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sdruntime.backends.ort.protobuf import delimited, fields, float32, number, varints

_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_OUTPUT = 1, 5, 12
_INPUT, _OUTPUT, _NAME, _OP, _ATTRIBUTE, _DOMAIN = 1, 2, 3, 4, 5, 7  # of NodeProto
_A_FLOAT, _AN_INT, _A_GRAPH, _GRAPHS = 1, 2, 5, 10  # AttributeProto.type
_INT64 = 7  # TensorProto.data_type
_SPLIT = [0, 2, 1, 3]  # [batch, sequence, heads, width] -> [batch, heads, sequence, width], and back
_JOINED = "sdruntime.heads_joined"  # the shape [0, 0, -1] for Reshape: two dimensions as they are, the others as one


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ints: Mapping[str, list[int]]  # attributes, one int or several
    floats: Mapping[str, float]
    raw: bytes | memoryview
    nested: bool = False  # has graphs of its own


@dataclass(slots=True, kw_only=True)
class _Graph:
    nodes: list[_Node]
    constants: dict[str, list[int]]  # small tensors of int64
    outputs: set[str]
    makers: dict[str, _Node] = field(init=False)
    readers: dict[str, list[_Node]] = field(init=False)

    def __post_init__(self) -> None:
        self.makers = {name: node for node in self.nodes for name in node.outputs}
        self.readers = {}
        for node in self.nodes:
            for name in node.inputs:
                self.readers.setdefault(name, []).append(node)

    def maker(self, name: str, op: str) -> _Node | None:
        node = self.makers.get(name)
        return node if node is not None and node.op == op else None

    def reader(self, name: str, op: str) -> _Node | None:
        """The only one that reads a tensor, and that is no output of the graph."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and readers[0].op == op and name not in self.outputs else None


def fuse_attention(model: memoryview) -> bytes:
    """The model with every attention without a mask as MultiHeadAttention; as it was where none is found. Raises ValueError for
    what is not a sound model."""
    graph = _read(model)
    if any(node.nested for node in graph.nodes):  # which may read any tensor of this one
        return bytes(model)
    fused: dict[int, list[_Node]] = {}
    for node in graph.nodes:
        if node.op == "Softmax" and (found := _attention(graph, node)):
            joining, made = found
            fused[id(joining)] = made
    if not fused:
        return bytes(model)
    nodes = [each for node in graph.nodes for each in fused.get(id(node), [node])]
    return _written(
        model, _needed(nodes, graph.outputs), {heads for each in fused.values() for heads in each[-2].ints["num_heads"]}
    )


def _attention(graph: _Graph, softmax: _Node) -> tuple[_Node, list[_Node]] | None:
    """The node that ends an attention around this Softmax, and those to put in its place."""
    scores, weighed = graph.maker(softmax.inputs[0], "FusedMatMul"), graph.reader(softmax.outputs[0], "MatMul")
    if scores is None or weighed is None or softmax.ints.get("axis") != [-1] or any(map(any, scores.ints.values())):
        return None
    joining = graph.reader(weighed.outputs[0], "Transpose")
    q, k, v = (
        _heads(graph, scores.inputs[0]),
        _heads(graph, _transposed(graph, scores.inputs[1])),
        _heads(graph, weighed.inputs[1]),
    )
    if joining is None or joining.ints.get("perm") != _SPLIT or q is None or k is None or v is None:
        return None
    heads = [_count(graph, each) for each in (q, k, v)]
    if heads[0] is None or len(set(heads)) != 1:
        return None
    out = joining.outputs[0]
    joined = [_node("Reshape", (each, _JOINED), f"{out}.{part}") for each, part in zip((q, k, v), "qkv", strict=True)]
    whole = _node(
        "MultiHeadAttention",
        tuple(node.outputs[0] for node in joined),
        f"{out}.joined",
        heads=heads[0],
        scale=scores.floats.get("alpha", 1.0),
    )
    split = _node("Reshape", (whole.outputs[0], _split_into(heads[0])), out)
    return joining, [*joined, whole, split]


def _heads(graph: _Graph, name: str | None) -> str | None:
    """[batch, sequence, heads, width] of what was split into [batch, heads, sequence, width]."""
    node = graph.maker(name, "Transpose") if name else None
    return node.inputs[0] if node is not None and node.ints.get("perm") == _SPLIT else None


def _transposed(graph: _Graph, name: str) -> str | None:
    """Of k^T: k. Torch's exporter transposes the last two of four dimensions with the first two as one."""
    after = graph.maker(name, "Reshape")
    turned = graph.maker(after.inputs[0], "Transpose") if after else None
    before = graph.maker(turned.inputs[0], "Reshape") if turned else None
    if turned is None or before is None or turned.ints.get("perm") != [0, 2, 1]:
        return None
    return before.inputs[0] if (shape := _shape(graph, before)) and len(shape) == 3 and shape[0] == -1 else None


def _count(graph: _Graph, name: str) -> int | None:
    node = graph.maker(name, "Reshape")
    shape = _shape(graph, node) if node else None
    return shape[2] if shape and len(shape) == 4 and shape[2] is not None and shape[2] > 0 else None


def _shape(graph: _Graph, reshape: _Node) -> list[int | None] | None:
    """What a Reshape makes, None for each dimension that is known only at a call; None where nothing is known."""
    name = reshape.inputs[1]
    if name in graph.constants:
        return list(graph.constants[name])
    made = graph.maker(name, "Concat")
    parts = [graph.constants.get(part) for part in made.inputs] if made else []
    return [part[0] if part else None for part in parts] if all(part is None or len(part) == 1 for part in parts) else None


def _needed(nodes: list[_Node], outputs: Iterable[str]) -> list[_Node]:
    """Those of which something is read in the end."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            wanted.update(node.inputs)
            kept.append(node)
    return kept[::-1]


def _read(model: memoryview) -> _Graph:
    nodes: list[_Node] = []
    constants: dict[str, list[int]] = {}
    outputs: set[str] = set()
    for part, value in _graph_fields(model):
        if part == _GRAPH_NODE:
            nodes.append(_read_node(value))
        elif part == _GRAPH_INITIALIZER:
            name, numbers = _read_constant(value)
            if numbers is not None:
                constants[name] = numbers
        elif part == _GRAPH_OUTPUT:
            outputs.add(next(str(text, "utf-8") for number, text in fields(value) if number == 1 and not isinstance(text, int)))
    return _Graph(nodes=nodes, constants=constants, outputs=outputs)


def _graph_fields(model: memoryview) -> list[tuple[int, memoryview]]:
    graphs = [value for part, value in fields(model) if part == _MODEL_GRAPH and not isinstance(value, int)]
    return [(part, value) for graph in graphs for part, value in fields(graph) if not isinstance(value, int)]


def _read_node(message: memoryview) -> _Node:
    texts: dict[int, list[str]] = {_INPUT: [], _OUTPUT: [], _OP: []}
    ints: dict[str, list[int]] = {}
    floats: dict[str, float] = {}
    kinds = set()
    for part, value in fields(message):
        if part in texts and isinstance(value, memoryview):
            texts[part].append(str(value, "utf-8"))
        elif part == _ATTRIBUTE and isinstance(value, memoryview):
            found = list(fields(value))
            name = next(str(text, "utf-8") for at, text in found if at == 1 and isinstance(text, memoryview))
            kinds |= {kind for at, kind in found if at == 20}
            ints[name] = [each for at, part in found if at in (3, 8) for each in _ints(part)]
            for at, bits in found:
                if at == 2 and isinstance(bits, memoryview):
                    floats[name] = struct.unpack("<f", bits)[0]
    return _Node(
        op=texts[_OP][0],
        inputs=tuple(texts[_INPUT]),
        outputs=tuple(texts[_OUTPUT]),
        ints={name: values for name, values in ints.items() if values},
        floats=floats,
        raw=message,
        nested=bool(kinds & {_A_GRAPH, _GRAPHS}),
    )


def _read_constant(message: memoryview) -> tuple[str, list[int] | None]:
    """A tensor's name and, where they are int64 and in the file, its numbers."""
    name, numbers, kind = "", None, 0
    for part, value in fields(message):
        if part == 8 and isinstance(value, memoryview):
            name = str(value, "utf-8")
        elif part == 2 and isinstance(value, int):
            kind = value
        elif part == 9 and isinstance(value, memoryview) and len(value) % 8 == 0:
            numbers = [each for (each,) in struct.iter_unpack("<q", value)]
        elif part == 7:
            numbers = (numbers or []) + _ints(value)
    return name, numbers if kind == _INT64 else None


def _ints(part: int | memoryview) -> list[int]:
    return [value - (1 << 64) if value >> 63 else value for value in ([part] if isinstance(part, int) else varints(part))]


def _node(op: str, inputs: tuple[str, ...], output: str, *, heads: int = 0, scale: float = 0.0) -> _Node:
    """A node of ONNX or, with heads and a scale, of ONNX Runtime's own."""
    raw = [delimited(_INPUT, name.encode()) for name in inputs]
    raw += [delimited(_OUTPUT, output.encode()), delimited(_NAME, output.encode()), delimited(_OP, op.encode())]
    if heads:
        raw += [
            delimited(_ATTRIBUTE, delimited(1, b"num_heads") + number(3, heads) + number(20, _AN_INT)),
            delimited(_ATTRIBUTE, delimited(1, b"scale") + float32(2, scale) + number(20, _A_FLOAT)),
            delimited(_DOMAIN, b"com.microsoft"),
        ]
    return _Node(
        op=op, inputs=inputs, outputs=(output,), ints={"num_heads": [heads]} if heads else {}, floats={}, raw=b"".join(raw)
    )


def _split_into(heads: int) -> str:
    """The name of the shape [0, 0, heads, -1]."""
    return f"sdruntime.split_into_{heads}_heads"


def _constant(name: str, values: list[int]) -> bytes:
    return (
        number(1, len(values))
        + number(2, _INT64)
        + delimited(8, name.encode())
        + delimited(9, struct.pack(f"<{len(values)}q", *values))
    )


def _written(model: memoryview, nodes: list[_Node], heads: set[int]) -> bytes:
    """The model with these nodes in place of its own, and without the constants that nothing reads."""
    read = {name for node in nodes for name in node.inputs}
    graph = [delimited(_GRAPH_NODE, node.raw) for node in nodes]
    for part, value in _graph_fields(model):
        if part != _GRAPH_NODE and not (part == _GRAPH_INITIALIZER and _read_constant(value)[0] not in read):
            graph.append(delimited(part, value))
    shapes = {_JOINED: [0, 0, -1]} | {_split_into(each): [0, 0, each, -1] for each in sorted(heads)}
    graph += [delimited(_GRAPH_INITIALIZER, _constant(name, values)) for name, values in shapes.items()]
    parts = []
    for part, each in fields(model):
        if part != _MODEL_GRAPH:
            parts.append(number(part, each) if isinstance(each, int) else delimited(part, each))
    return b"".join([*parts, delimited(_MODEL_GRAPH, b"".join(graph))])
