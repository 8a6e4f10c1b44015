"""The precision of a graph is written in its types (TensorRT 11 knows no other way): float32, rewritten around some nodes.

The edges stay float32, and so does the sinusoid of the timestep: its angles reach 1000 radians, where half precision has steps
of a half. Everything else follows from the schema of each operator: an operator or an input that has no type of the lower
precision stays float32 (Range; the scales of Resize).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnx_ir as ir

from sdexport.errors import PrecisionError
from sdexport.weights import Array, in_precision, largest
from sdruntime.manifest import Precision

_TYPES: dict[Precision, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}
# convolutions and normalisations take bfloat16 since then; nothing else changed in the operators that are in use
_OPSETS: dict[Precision, int] = {"fp32": 20, "fp16": 20, "bf16": 22}
_PERIODIC = ("Sin", "Cos")
_PRODUCTS = ("Gemm", "MatMul", "Conv")
_LOWEST = float(np.finfo(np.float32).min)  # what masks use where they mean minus infinity


def apply_precision(
    model: ir.Model, precision: Precision, *, inputs: Iterable[str], keep: frozenset[str]
) -> dict[str, Precision]:
    """Rewrite a float32 graph in place, around the nodes named in `keep`, and return the precision of each of its weights.

    `inputs`: the graph's inputs that are not weights. Raises PrecisionError with the constants that the precision cannot hold.
    """
    own = frozenset(inputs)
    weights = [value for value in model.graph.inputs if value.name not in own]
    if precision != "fp32":
        _Rewriter(model, precision, keep, weights).rewrite(own)
    names = {kind: name for name, kind in _TYPES.items()}
    return {str(value.name): names[ir.DataType(value.dtype or 0)] for value in weights}


def sinusoid(graph: ir.Graph) -> set[ir.Node]:
    """The nodes of a positional sinusoid: what feeds a sine or cosine, and what follows it up to a product with weights."""
    periodic = [node for node in graph if node.op_type in _PERIODIC]
    found: set[ir.Node] = set()
    before, after = list(periodic), list(periodic)
    while before:
        node = before.pop()
        found.add(node)
        producers = {value.producer() for value in node.inputs if value is not None}
        before += [producer for producer in producers if producer is not None and producer not in found]
    while after:
        node = after.pop()
        found.add(node)
        users = {user for value in node.outputs for user, _ in value.uses()}
        after += [user for user in users - found if user.op_type not in _PRODUCTS]
    return found


class _Rewriter:
    """One rewriting of a graph. A value's type tells in which precision it is at hand; casts are made once a value."""

    def __init__(self, model: ir.Model, precision: Precision, keep: frozenset[str], weights: list[ir.Value]) -> None:
        self.model, self.graph = model, model.graph
        self.precision, self.low, self.opset = precision, _TYPES[precision], _OPSETS[precision]
        self.weights = weights
        unknown = keep - {str(node.name) for node in self.graph}
        assert not unknown, f"no such nodes: {sorted(unknown)}"
        self.kept = sinusoid(self.graph) | {node for node in self.graph if node.name in keep or not self._admits_output(node)}
        self.converted: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.faults: list[str] = []

    def rewrite(self, own: frozenset[str]) -> None:
        for weight in self.weights:
            users = {self._wanted(node, index) for node, index in weight.uses()}
            if users == {self.low}:
                weight.dtype = self.low
        floats = {value for node in self.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT}
        for node in list(self.graph):
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype in (ir.DataType.FLOAT, self.low):
                    node.replace_input_with(index, self._as(value, self._wanted(node, index)))
            if node not in self.kept:
                self._lower_outputs(node, floats)
        for index, output in enumerate(self.graph.outputs):
            if output in floats and output.dtype == self.low:
                self._raise_output(index, output)
        self.model.opset_imports[""] = self.opset
        for name, value in list(self.graph.initializers.items()):
            if not value.uses():
                self.graph.initializers.pop(name)
        if self.faults:
            raise PrecisionError("constants beyond the precision", self.faults)

    def _wanted(self, node: ir.Node, index: int) -> ir.DataType:
        return ir.DataType.FLOAT if node in self.kept or not self._admits_input(node, index) else self.low

    def _schema(self, node: ir.Node) -> onnx.defs.OpSchema:
        return onnx.defs.get_schema(node.op_type, self.opset, "")

    def _admits_input(self, node: ir.Node, index: int) -> bool:
        formal = self._schema(node).inputs
        return self._type_name in formal[min(index, len(formal) - 1)].types

    def _admits_output(self, node: ir.Node) -> bool:
        formal = self._schema(node).outputs
        floats = [index for index, value in enumerate(node.outputs) if value.dtype == ir.DataType.FLOAT]
        return all(self._type_name in formal[min(index, len(formal) - 1)].types for index in floats)

    @property
    def _type_name(self) -> str:
        return f"tensor({self.low.name.lower()})"

    def _as(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        """The value in a type: itself, a converted constant, or a cast."""
        if value.dtype == kind:
            return value
        if (value, kind) not in self.converted:
            made = self._converted_constant(value) if value.const_value is not None else self._cast(value, kind)
            self.converted[value, kind] = made
        return self.converted[value, kind]

    def _cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        name = f"{value.name}.{kind.name.lower()}"
        made = ir.Value(name=name, shape=value.shape, type=ir.TensorType(kind))
        cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(kind))], outputs=[made], name=f"cast.{name}")
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], cast)
        else:
            self.graph.insert_after(producer, cast)
        return made

    def _converted_constant(self, value: ir.Value) -> ir.Value:
        assert value.const_value is not None
        name = f"{value.name}.{self.low.name.lower()}"
        tensor = ir.tensor(self._lowered(value.const_value.numpy(), str(value.name)), name=name)
        made = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(self.low), const_value=tensor)
        self.graph.register_initializer(made)
        return made

    def _lowered(self, numbers: Array, where: str) -> Array:
        finite = np.where(np.isinf(numbers) | (numbers <= _LOWEST), 0, numbers)
        lowered, fault = in_precision(finite, self.precision)
        if not fault and np.any((lowered == 0) & (finite != 0)):
            fault = f"{np.min(np.abs(finite[finite != 0])):g} becomes zero in {self.precision}"
        if fault:
            self.faults.append(f"{where}: {fault}")
        lowest = np.asarray(-largest(self.precision), lowered.dtype)
        meant = np.where(numbers <= _LOWEST, lowest, lowered)
        return np.where(np.isinf(numbers), np.copysign(np.asarray(np.inf, lowered.dtype), meant), meant)

    def _lower_outputs(self, node: ir.Node, floats: set[ir.Value]) -> None:
        for value in node.outputs:
            if value in floats:
                value.dtype = self.low
        if node.op_type == "Cast" and node.outputs[0] in floats:
            node.attributes["to"] = ir.AttrInt64("to", int(self.low))
        if node.op_type == "ConstantOfShape" and node.outputs[0] in floats:
            filler = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1, np.float32)
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(self._lowered(filler, str(node.name))))

    def _raise_output(self, index: int, output: ir.Value) -> None:
        name = output.name
        output.name = f"{name}.{self.low.name.lower()}"
        made = self._cast(output, ir.DataType.FLOAT)
        made.name, made.shape = name, output.shape
        self.graph.outputs[index] = made
