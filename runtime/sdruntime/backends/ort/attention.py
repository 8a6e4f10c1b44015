"""Fuse attention into ONNX Runtime's MultiHeadAttention, in the graph that its optimizer saved.

The export writes attention as matrix products around a Softmax, which any library can read. ONNX Runtime's CPU kernel of
MultiHeadAttention works in blocks that fit the cache (Dao et al. 2022, FlashAttention), so it never stores the scores: 1.1 GB for
two rows of a UNet at 64x64 latents.

    Softmax(alpha * q @ k^T) @ v, with q, k and v split into heads and the heads joined again
"""

from __future__ import annotations

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.onnx_file.graph import Graph, Node, make_node, read_graph, write_graph

_SPLIT = [0, 2, 1, 3]  # [batch, sequence, heads, width] -> [batch, heads, sequence, width], and back
_JOINED = "sdruntime.heads_joined"  # the Reshape target [0, 0, -1]: keeps two dimensions and merges the others


def fuse_attention(model: memoryview) -> bytes:
    """Return the model with every unmasked attention as MultiHeadAttention, or unchanged if it has none.

    Raises ValueError for a damaged model.
    """
    graph = read_graph(model)
    fused: dict[int, list[Node]] = {}
    shapes: dict[str, Array] = {_JOINED: np.array([0, 0, -1], np.int64)}
    for node in graph.nodes:
        if node.op == "Softmax" and (attention := _attention(graph, node)):
            last, heads, replacement = attention
            fused[id(last)] = replacement
            shapes[_split_into(heads)] = np.array([0, 0, heads, -1], np.int64)
    return write_graph(model, graph, fused, shapes) if fused else bytes(model)


def _attention(graph: Graph, softmax: Node) -> tuple[Node, int, list[Node]] | None:
    """Return the last node of the attention around a Softmax, its number of heads, and the nodes that replace it."""
    scores, weighted = graph.maker(softmax.inputs[0], "FusedMatMul"), graph.reader(softmax.outputs[0], "MatMul")
    if scores is None or weighted is None or softmax.ints.get("axis") != [-1] or any(map(any, scores.ints.values())):
        return None
    last = graph.reader(weighted.outputs[0], "Transpose")
    q, k, v = (
        _heads(graph, scores.inputs[0]),
        _heads(graph, _transposed(graph, scores.inputs[1])),
        _heads(graph, weighted.inputs[1]),
    )
    if last is None or last.ints.get("perm") != _SPLIT or q is None or k is None or v is None:
        return None
    heads, *others = (_count(graph, name) for name in (q, k, v))
    if heads is None or others != [heads, heads]:
        return None
    out = last.outputs[0]
    joined = [make_node("Reshape", (name, _JOINED), f"{out}.{part}") for name, part in zip((q, k, v), "qkv", strict=True)]
    attributes = {"num_heads": heads, "scale": scores.floats.get("alpha", 1.0)}
    inputs = [node.outputs[0] for node in joined]
    attention = make_node("MultiHeadAttention", inputs, f"{out}.joined", attributes, domain="com.microsoft")
    return last, heads, [*joined, attention, make_node("Reshape", (attention.outputs[0], _split_into(heads)), out)]


def _heads(graph: Graph, name: str | None) -> str | None:
    """Return the [batch, sequence, heads, width] tensor from which `name`, [batch, heads, sequence, width], was transposed."""
    node = graph.maker(name, "Transpose") if name else None
    return node.inputs[0] if node is not None and node.ints.get("perm") == _SPLIT else None


def _transposed(graph: Graph, name: str) -> str | None:
    """Return k for k^T. Torch's exporter merges the first two of four dimensions before it transposes the last two."""
    after = graph.maker(name, "Reshape")
    transpose = graph.maker(after.inputs[0], "Transpose") if after else None
    before = graph.maker(transpose.inputs[0], "Reshape") if transpose else None
    if transpose is None or before is None or transpose.ints.get("perm") != [0, 2, 1]:
        return None
    return before.inputs[0] if (shape := _shape(graph, before)) and len(shape) == 3 and shape[0] == -1 else None


def _count(graph: Graph, name: str) -> int | None:
    """Return the number of heads of a [batch, sequence, heads, width] tensor, or None if it is unknown."""
    node = graph.maker(name, "Reshape")
    shape = _shape(graph, node) if node else None
    return int(shape[2]) if shape and len(shape) == 4 and shape[2] is not None and shape[2] > 0 else None


def _shape(graph: Graph, reshape: Node) -> list[float | None] | None:
    """Return the target shape of a Reshape, with None for each dynamic dimension, or None if nothing is known."""
    name = reshape.inputs[1]
    if name in graph.constants:
        return list(graph.constants[name])
    concat = graph.maker(name, "Concat")
    parts = [graph.constants.get(part) for part in concat.inputs] if concat else []
    return [part[0] if part else None for part in parts] if all(part is None or len(part) == 1 for part in parts) else None


def _split_into(heads: int) -> str:
    """Return the name of the constant [0, 0, heads, -1]."""
    return f"sdruntime.split_into_{heads}_heads"
