"""A component's float32 graph with some of its nodes in half precision, computed in float32 as the CPU's kernels do.

The outputs, inputs and weights of those nodes are rounded to the type and back, as in the graph that would be made of them. ONNX
Runtime's own run of that graph shows less: on a CPU it puts casts around nodes that have no half kernel, and takes out those that
meet. And it has no kernels for bfloat16 at all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from sdexport.checkpoint.safetensors import Array
from sdexport.precision.activations import Feed, session_of, with_nodes
from sdexport.precision.numbers import largest
from sdexport.precision.rewrite import TYPES, filler, free_nodes, logits, lowered, takes_half
from sdruntime.bundle.manifest import Precision

_OWN = "sdexport.rounded."


class Rounding:
    """The graph of `path`. `names`: its nodes that have a choice, in order. The graph of the last set is kept open."""

    def __init__(self, path: Path, precision: Precision) -> None:
        self.model = ir.load(path)
        self.path, self.precision = path, precision
        graph = self.model.graph
        free = free_nodes(graph, precision)
        self.names = [str(node.name) for node in free]
        self._takes = {
            str(node.name): {index for index in range(len(node.inputs)) if takes_half(node, index, precision)} for node in free
        }
        self._values = {
            str(value.name): value
            for value in (*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs))
            if value.dtype == ir.DataType.FLOAT
        }
        self._ends = logits(graph)
        self._open: tuple[frozenset[str], Any] | None = None

    def run(self, feed: Feed, half: Collection[str]) -> list[Array]:
        """The outputs where the nodes of these names are in half precision, and no others."""
        wanted = frozenset(half)
        if self._open is None or self._open[0] != wanted:
            self.close()  # its memory goes first
            self._open = wanted, session_of(self._rounded(wanted), self.path)
        return list(self._open[1].run(None, dict(feed.arrays)))

    def close(self) -> None:
        self._open = None

    def _rounded(self, half: frozenset[str]) -> onnx.ModelProto:
        proto = ir.to_proto(self.model)
        made: dict[str, str] = {}  # values, and what they are called when rounded
        nodes: list[onnx.NodeProto] = []
        low = {name for node in proto.graph.node if node.name in half for name in node.output if name in self._values}
        for node in proto.graph.node:
            takes = self._takes[node.name] if node.name in half else ()
            for index, name in enumerate(node.input):
                if name in low or (index in takes and name in self._values):
                    if name not in made:
                        made[name] = f"{_OWN}{name}"
                        nodes += self._cast(proto, name)
                    node.input[index] = made[name]
            nodes.append(node)
        for output in proto.graph.output:
            if output.name in low:
                nodes += self._cast(proto, output.name) if output.name not in made else ()
                output.name = f"{_OWN}{output.name}"
        with_nodes(proto, nodes)
        return proto

    def _cast(self, proto: onnx.ModelProto, name: str) -> Iterator[onnx.NodeProto]:
        """What makes the rounded value of another."""
        value, rounded, mask = self._values[name], f"{_OWN}{name}", self._values[name] in self._ends
        if value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor):
            numbers, _ = lowered(value.const_value.numpy(), self.precision, mask=mask)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(numbers.astype(np.float32), rounded))
            return
        producer = value.producer()
        if producer is not None and producer.op_type == "ConstantOfShape":
            fill, _ = lowered(filler(producer), self.precision, mask=mask)
            if np.isfinite(fill).all():  # what is below the precision is filled in as its lowest
                least = np.array(-largest(self.precision), np.float32)
                proto.graph.initializer.append(onnx.numpy_helper.from_array(least, f"{rounded}.least"))
                yield onnx.helper.make_node("Max", [name, f"{rounded}.least"], [f"{rounded}.filled"])
                name = f"{rounded}.filled"
        yield onnx.helper.make_node("Cast", [name], [f"{rounded}.low"], to=int(TYPES[self.precision]))
        yield onnx.helper.make_node("Cast", [f"{rounded}.low"], [rounded], to=int(ir.DataType.FLOAT))
