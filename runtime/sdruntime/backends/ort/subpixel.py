"""Rewrite upsampling convolutions with fewer products (sdruntime.backends.base.subpixel) in an ONNX graph.

The kernels are written as products of the model's own weights, which ONNX Runtime's optimizer computes once.

A UNet's upsampled image is cropped before the convolution if its size is odd. Its last row and column then meet the zero padding,
and are computed from the model's own weights in the branch of an If.
"""

from __future__ import annotations

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.subpixel import PHASES, TAPS, pads
from sdruntime.backends.onnx_file.graph import Graph, Node, make_branch, make_node, read_graph, write_graph

_RESIZE = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
_CONVOLUTION = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [1, 1], "dilations": [1, 1], "group": [1]}


def split_upsampling(model: memoryview) -> bytes:
    """Return the model with four convolutions for each one that follows a 2x upsampling, or unchanged if it has none.

    Its weights must be float32. Raises ValueError for a damaged model.
    """
    graph = read_graph(model)
    split = {
        id(node): _phases(node, resize.inputs[0]) if crop is None else _cropped(node, resize, crop)
        for node in graph.nodes
        if node.op == "Conv"
        for crop in [_crop(graph, node)]
        if (resize := _upsampling(graph, node, crop))
    }
    return write_graph(model, graph, split, _constants()) if split else bytes(model)


def _crop(graph: Graph, convolution: Node) -> Node | None:
    """Return the Slice before a convolution, if it removes the end of the height and of the width."""
    crop = graph.maker(convolution.inputs[0], "Slice")
    if crop is None or len(crop.inputs) < 4:
        return None
    starts, axes, *steps = (graph.constants.get(crop.inputs[k]) for k in (1, 3, *range(4, len(crop.inputs))))
    return crop if starts == [0, 0] and axes == [2, 3] and steps in ([], [[1, 1]]) else None


def _upsampling(graph: Graph, convolution: Node, crop: Node | None) -> Node | None:
    """Return the 2x upsampling before a convolution, or None if there is none or either has other attributes."""
    resize = graph.maker((crop or convolution).inputs[0], "Resize")
    if resize is None or len(resize.inputs) != 3 or graph.constants.get(resize.inputs[2]) != [1, 1, 2, 2]:
        return None
    plain = all(resize.texts.get(name) == value for name, value in _RESIZE.items()) and "axes" not in resize.ints
    fits = all(convolution.ints.get(name) == value for name, value in _CONVOLUTION.items())
    return resize if plain and fits and convolution.texts.get("auto_pad", "NOTSET") == "NOTSET" else None


def _cropped(convolution: Node, resize: Node, crop: Node) -> list[Node]:
    """Return the nodes that replace a convolution of a cropped image."""
    (_, *kernel), out, ends = convolution.inputs, convolution.outputs[0], crop.inputs[2]
    whole, large, edge = f"{out}.whole", f"{out}.large", f"{out}.edge"
    corner = f"{_NAME}.corner"
    branch = [
        make_node("Resize", resize.inputs, large, dict(_RESIZE)),
        make_node("Slice", (large, corner, ends, f"{_NAME}.sides"), f"{out}.cropped"),
        make_node("Pad", (f"{out}.cropped", f"{_NAME}.pads"), f"{out}.padded"),
    ]
    for axis in (2, 3):  # the last row, then the last column, each from the last three of the padded image
        last = (f"{out}.padded", f"{_NAME}.third_last", f"{_NAME}.end", f"{_NAME}.axis.{axis}")
        branch.append(make_node("Slice", last, f"{edge}.{axis}.image"))
        branch.append(make_node("Conv", (f"{edge}.{axis}.image", *kernel), f"{edge}.{axis}", {"kernel_shape": [3, 3]}))
    branch += [
        make_node("Sub", (ends, f"{_NAME}.one"), f"{out}.inner_ends"),
        make_node("Slice", (whole, corner, f"{out}.inner_ends", f"{_NAME}.sides"), f"{out}.inner"),
        make_node("Slice", (f"{edge}.3", f"{_NAME}.first", f"{_NAME}.last", f"{_NAME}.axis.2"), f"{edge}.upper"),
        make_node("Concat", (f"{out}.inner", f"{edge}.upper"), f"{out}.upper", {"axis": 3}),
        make_node("Concat", (f"{out}.upper", f"{edge}.2"), f"{out}.corrected", {"axis": 2}),
    ]
    same = [make_node("Identity", (whole,), f"{out}.same")]
    return [
        *_phases(convolution, resize.inputs[0], whole),
        make_node("Shape", (whole,), f"{out}.sides", {"start": 2, "end": 4}),
        make_node("ReduceSum", (f"{out}.sides",), f"{out}.sides.sum"),
        make_node("ReduceSum", (ends,), f"{out}.ends.sum"),
        make_node("Sub", (f"{out}.sides.sum", f"{out}.ends.sum"), f"{out}.removed"),
        make_node("Cast", (f"{out}.removed",), f"{out}.is_cropped", {"to": _BOOL}),
        make_node(
            "If",
            (f"{out}.is_cropped",),
            out,
            {
                "then_branch": make_branch(branch, f"{out}.corrected"),
                "else_branch": make_branch(same, f"{out}.same"),
            },
        ),
    ]


def _phases(convolution: Node, image: str, whole: str = "") -> list[Node]:
    """Return the nodes of a convolution: `image` is its input before the upsampling, `whole` the output (its own)."""
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
    return [*nodes, make_node("DepthToSpace", (f"{out}.phases",), whole or out, {"blocksize": 2, "mode": "DCR"})]


_NAME = "sdruntime.taps"


_BOOL = 9  # TensorProto.data_type


def _constants() -> dict[str, Array]:
    numbers = {
        "corner": [0, 0],
        "sides": [2, 3],
        "first": [0],
        "last": [-1],
        "third_last": [-3],
        "end": [1 << 30],
        "one": [1],
        "pads": [0, 0, 1, 1, 0, 0, 1, 1],
        "axis.2": [2],
        "axis.3": [3],
    }
    taps = {f"{_NAME}.{p}": TAPS[p] for p in (0, 1)} | {f"{_NAME}.{q}.T": TAPS[q].T for q in (0, 1)}
    return taps | {f"{_NAME}.{name}": np.array(values, np.int64) for name, values in numbers.items()}
