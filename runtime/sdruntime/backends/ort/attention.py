"""Attention as one node of ONNX Runtime's own, in the graph that its optimiser has saved.

The export writes attention as products around a Softmax, so that any library can read it. ONNX Runtime's CPU kernel of
MultiHeadAttention goes over it in blocks that fit the cache (Dao et al. 2022, FlashAttention) and never holds the scores, 1.1 GB
for two rows of a UNet at 64x64 latents.

    Softmax(alpha * q @ k^T) @ v, with q, k and v split into heads and the heads joined again
"""

from __future__ import annotations

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.onnx_file.graph import Graph, Node, make_node, read_graph, write_graph

_SPLIT = [0, 2, 1, 3]  # [batch, sequence, heads, width] -> [batch, heads, sequence, width], and back
_JOINED = "sdruntime.heads_joined"  # the shape [0, 0, -1] for Reshape: two dimensions as they are, the others as one


def fuse_attention(model: memoryview) -> bytes:
    """The model with every attention without a mask as MultiHeadAttention; as it was where none is found. Raises ValueError for
    what is not a sound model."""
    graph = read_graph(model)
    fused: dict[int, list[Node]] = {}
    shapes: dict[str, Array] = {_JOINED: np.array([0, 0, -1], np.int64)}
    for node in graph.nodes if graph else []:
        if node.op == "Softmax" and graph and (found := _attention(graph, node)):
            joining, heads, made = found
            fused[id(joining)] = made
            shapes[_split_into(heads)] = np.array([0, 0, heads, -1], np.int64)
    return write_graph(model, graph, fused, shapes) if graph and fused else bytes(model)


def _attention(graph: Graph, softmax: Node) -> tuple[Node, int, list[Node]] | None:
    """The node that ends an attention around this Softmax, its number of heads, and the nodes to put in its place."""
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
    heads, *others = (_count(graph, each) for each in (q, k, v))
    if heads is None or others != [heads, heads]:
        return None
    out = joining.outputs[0]
    joined = [make_node("Reshape", (each, _JOINED), f"{out}.{part}") for each, part in zip((q, k, v), "qkv", strict=True)]
    settings = {"num_heads": heads, "scale": scores.floats.get("alpha", 1.0)}
    parts = [node.outputs[0] for node in joined]
    whole = make_node("MultiHeadAttention", parts, f"{out}.joined", settings, domain="com.microsoft")
    return joining, heads, [*joined, whole, make_node("Reshape", (whole.outputs[0], _split_into(heads)), out)]


def _heads(graph: Graph, name: str | None) -> str | None:
    """[batch, sequence, heads, width] of what was split into [batch, heads, sequence, width]."""
    node = graph.maker(name, "Transpose") if name else None
    return node.inputs[0] if node is not None and node.ints.get("perm") == _SPLIT else None


def _transposed(graph: Graph, name: str) -> str | None:
    """Of k^T: k. Torch's exporter transposes the last two of four dimensions with the first two as one."""
    after = graph.maker(name, "Reshape")
    turned = graph.maker(after.inputs[0], "Transpose") if after else None
    before = graph.maker(turned.inputs[0], "Reshape") if turned else None
    if turned is None or before is None or turned.ints.get("perm") != [0, 2, 1]:
        return None
    return before.inputs[0] if (shape := _shape(graph, before)) and len(shape) == 3 and shape[0] == -1 else None


def _count(graph: Graph, name: str) -> int | None:
    node = graph.maker(name, "Reshape")
    shape = _shape(graph, node) if node else None
    return int(shape[2]) if shape and len(shape) == 4 and shape[2] is not None and shape[2] > 0 else None


def _shape(graph: Graph, reshape: Node) -> list[float | None] | None:
    """What a Reshape makes, None for each dimension that is known only at a call; None where nothing is known."""
    name = reshape.inputs[1]
    if name in graph.constants:
        return list(graph.constants[name])
    made = graph.maker(name, "Concat")
    parts = [graph.constants.get(part) for part in made.inputs] if made else []
    return [part[0] if part else None for part in parts] if all(part is None or len(part) == 1 for part in parts) else None


def _split_into(heads: int) -> str:
    """The name of the shape [0, 0, heads, -1]."""
    return f"sdruntime.split_into_{heads}_heads"
