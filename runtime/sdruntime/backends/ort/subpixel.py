"""Rewrite upsampling convolutions with fewer products (sdruntime.backends.base.subpixel) in an ONNX graph.

The kernels are written as products of the model's own weights, which ONNX Runtime's optimizer computes once.
"""

from __future__ import annotations

from sdruntime.arrays import Array
from sdruntime.backends.base.subpixel import PHASES, TAPS, pads
from sdruntime.backends.onnx_file.graph import Graph, Node, make_node, read_graph, write_graph

_RESIZE = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
_CONVOLUTION = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [1, 1], "dilations": [1, 1], "group": [1]}


def split_upsampling(model: memoryview) -> bytes:
    """Return the model with four convolutions for each one that follows a 2x upsampling, or unchanged if it has none.

    Its weights must be float32. Raises ValueError for a damaged model.
    """
    graph = read_graph(model)
    split = {
        id(node): _phases(node, upsampled.inputs[0])
        for node in (graph.nodes if graph else [])
        if node.op == "Conv" and graph and (upsampled := _upsampling(graph, node))
    }
    return write_graph(model, graph, split, dict(_taps())) if graph and split else bytes(model)


def _upsampling(graph: Graph, convolution: Node) -> Node | None:
    """Return the 2x upsampling before a convolution, or None if there is none or either has other attributes."""
    resize = graph.maker(convolution.inputs[0], "Resize")
    if resize is None or len(resize.inputs) != 3 or graph.constants.get(resize.inputs[2]) != [1, 1, 2, 2]:
        return None
    plain = all(resize.texts.get(name) == value for name, value in _RESIZE.items()) and "axes" not in resize.ints
    fits = all(convolution.ints.get(name) == value for name, value in _CONVOLUTION.items())
    return resize if plain and fits and convolution.texts.get("auto_pad", "NOTSET") == "NOTSET" else None


def _phases(convolution: Node, image: str) -> list[Node]:
    """Return the nodes that replace a convolution: `image` is its input before the upsampling."""
    (_, weights, *bias), out = convolution.inputs, convolution.outputs[0]
    nodes = [make_node("MatMul", (weights, f"{_NAME}.{q}.T"), f"{out}.weights.{q}") for q in (0, 1)]
    for p, q in PHASES:
        before, after = pads(p, q)
        nodes += [
            make_node("MatMul", (f"{_NAME}.{p}", f"{out}.weights.{q}"), f"{out}.weights.{p}{q}"),
            make_node(
                "Conv",
                (image, f"{out}.weights.{p}{q}", *bias),
                f"{out}.{p}{q}",
                {"kernel_shape": [2, 2], "pads": before + after},
            ),
        ]
    nodes.append(make_node("Concat", [f"{out}.{p}{q}" for p, q in PHASES], f"{out}.phases", {"axis": 1}))
    return [*nodes, make_node("DepthToSpace", (f"{out}.phases",), out, {"blocksize": 2, "mode": "DCR"})]


_NAME = "sdruntime.taps"


def _taps() -> list[tuple[str, Array]]:
    return [(f"{_NAME}.{p}", TAPS[p]) for p in (0, 1)] + [(f"{_NAME}.{q}.T", TAPS[q].T) for q in (0, 1)]
