"""Simulate half precision for some nodes of a component's float32 graph: compute in float32 and round as the real graph would.

The outputs, inputs and weights of those nodes are rounded to the type and back. Running the real graph in ONNX Runtime would show
less error: on a CPU it puts casts around nodes without a half kernel and removes casts that cancel out. It also has no bfloat16
kernels at all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from sdexport.checkpoint.weights.safetensors import Array
from sdexport.precision.activations import Feed, session_of, with_nodes
from sdexport.precision.numbers import largest
from sdexport.precision.rewrite import TYPES, accepts_half, fill_value, free_nodes, logits, lower_constant
from sdruntime.bundle.manifest import Precision

_OWN = "sdexport.rounded."


class Rounding:
    """The graph of `path`; `names` are its nodes with a choice, in order. The session of the last set of nodes is kept open."""

    def __init__(self, path: Path, precision: Precision) -> None:
        self.model = ir.load(path)
        self.path, self.precision = path, precision
        graph = self.model.graph
        free = free_nodes(graph, precision)
        self.names = [str(node.name) for node in free]
        self._half_inputs = {
            str(node.name): {index for index in range(len(node.inputs)) if accepts_half(node, index, precision)} for node in free
        }
        self._values = {
            str(value.name): value
            for value in (*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs))
            if value.dtype == ir.DataType.FLOAT
        }
        self._logits = logits(graph)
        self._open: tuple[frozenset[str], Any] | None = None

    def run(self, feed: Feed, half: Collection[str]) -> list[Array]:
        """Return the outputs with only the nodes named in `half` in half precision."""
        nodes = frozenset(half)
        if self._open is None or self._open[0] != nodes:
            self.close()  # frees its memory before the next session opens
            self._open = nodes, session_of(self._rounded(nodes), self.path)
        return list(self._open[1].run(None, dict(feed.arrays)))

    def close(self) -> None:
        self._open = None

    def _rounded(self, half: frozenset[str]) -> onnx.ModelProto:
        proto = ir.to_proto(self.model)
        rounded: dict[str, str] = {}  # value -> name of its rounded copy
        nodes: list[onnx.NodeProto] = []
        low = {name for node in proto.graph.node if node.name in half for name in node.output if name in self._values}
        for node in proto.graph.node:
            half_inputs = self._half_inputs[node.name] if node.name in half else ()
            for index, name in enumerate(node.input):
                if name in low or (index in half_inputs and name in self._values):
                    if name not in rounded:
                        rounded[name] = f"{_OWN}{name}"
                        nodes += self._cast(proto, name)
                    node.input[index] = rounded[name]
            nodes.append(node)
        for output in proto.graph.output:
            if output.name in low:
                nodes += self._cast(proto, output.name) if output.name not in rounded else ()
                output.name = f"{_OWN}{output.name}"
        with_nodes(proto, nodes)
        return proto

    def _cast(self, proto: onnx.ModelProto, name: str) -> Iterator[onnx.NodeProto]:
        """Yield the nodes that round a value; a constant becomes an initializer instead."""
        value, rounded, mask = self._values[name], f"{_OWN}{name}", self._values[name] in self._logits
        tensor = None if value.is_graph_input() else value.const_value  # an optional input's is its default, not its number
        if tensor is not None and not isinstance(tensor, ir.ExternalTensor):
            numbers, _ = lower_constant(tensor.numpy(), self.precision, mask=mask)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(numbers.astype(np.float32), rounded))
            return
        producer = value.producer()
        if producer is not None and producer.op_type == "ConstantOfShape":
            fill, _ = lower_constant(fill_value(producer), self.precision, mask=mask)
            if np.isfinite(fill).all():  # numbers below the precision's range become its lowest
                least = np.array(-largest(self.precision), np.float32)
                proto.graph.initializer.append(onnx.numpy_helper.from_array(least, f"{rounded}.least"))
                yield onnx.helper.make_node("Max", [name, f"{rounded}.least"], [f"{rounded}.filled"])
                name = f"{rounded}.filled"
        yield onnx.helper.make_node("Cast", [name], [f"{rounded}.low"], to=int(TYPES[self.precision]))
        yield onnx.helper.make_node("Cast", [f"{rounded}.low"], [rounded], to=int(ir.DataType.FLOAT))
