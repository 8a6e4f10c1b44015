"""Find the places of a component's weights in ONNX Runtime's engine, so that they can be replaced when it is opened.

The optimizer computes what follows from weights alone, and stores the result under the name of the tensor: the transposed weight
of a matrix product, a reshaped norm, the kernels of an upsampling convolution (sdruntime.backends.ort.subpixel). Where each
weight went follows from the component's ONNX model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.subpixel import PHASES, TAPS
from sdruntime.backends.base.weights import check_found
from sdruntime.backends.onnx_file.graph import Graph, Node, read_graph

Place = Callable[[Array], Array]  # from a weight to the engine's tensor
Shapes = Mapping[str, tuple[int, ...]]  # of the engine's initializers, by name


def places_of(onnx: memoryview, weights: Collection[str], engine: Shapes) -> dict[str, tuple[str, Place]]:
    """Return, for each initializer of the engine that follows from one of the weights, that weight and how it follows.

    `onnx`: the component's model. Raises ValueError for a damaged model, and with the weights that the engine does not have.
    """
    graph, places = read_graph(onnx), dict[str, tuple[str, Place]]()
    missing = []
    for weight in weights:
        placed = dict(_places(graph, weight, engine))
        own = weight in engine
        if own:
            placed[weight] = _same
        if not placed or (not own and any(not _is_placed(node, weight, engine) for node in graph.readers.get(weight, []))):
            missing.append(weight)
        places |= {name: (weight, place) for name, place in placed.items()}
    check_found(missing)
    return places


def _places(graph: Graph, weight: str, engine: Shapes) -> Iterator[tuple[str, Place]]:
    for node in graph.readers.get(weight, []):
        for name in _results(node, weight):
            if name in engine:
                yield name, _place(node, name, engine[name])


def _is_placed(node: Node, weight: str, engine: Shapes) -> bool:
    return any(name in engine for name in _results(node, weight))


def _results(node: Node, weight: str) -> tuple[str, ...]:
    """Return the names of the tensors that the optimizer makes of a weight alone, where `node` reads it."""
    if node.op == "Conv" and node.inputs[1] == weight:
        return tuple(f"{node.outputs[0]}.weights.{p}{q}" for p, q in PHASES)
    return node.outputs if node.op in ("Transpose", "Unsqueeze", "Reshape") else ()


def _place(node: Node, name: str, shape: tuple[int, ...]) -> Place:
    if node.op == "Transpose":
        axes = node.ints["perm"]
        return lambda weight: np.ascontiguousarray(weight.transpose(axes))
    if node.op == "Conv":
        p, q = int(name[-2]), int(name[-1])
        return lambda weight: TAPS[p] @ weight @ TAPS[q].T
    return lambda weight: weight.reshape(shape)


def _same(weight: Array) -> Array:
    return weight
