"""Rewrite a float32 graph to a lower precision, except for some nodes. The types of the graph carry the precision.

(TensorRT 11 supports no other way.) The graph's inputs and outputs stay float32, and so does the sinusoid of the timestep: its
angles reach 1000 radians, where half precision has steps of 0.5. Everything else follows from the operators' schemas: an operator
or an input that does not allow the lower precision stays float32 (Range; the scales of Resize).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnx_ir as ir

from sdexport.checkpoint.weights.safetensors import Array
from sdexport.errors import PrecisionError
from sdexport.precision.numbers import in_precision, largest
from sdruntime.bundle.manifest import Precision

TYPES: dict[Precision, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}
# convolutions and normalisations accept bfloat16 since opset 22; nothing else changed in the operators in use
_OPSETS: dict[Precision, int] = {"fp32": 20, "fp16": 20, "bf16": 22}
_PERIODIC = ("Sin", "Cos")
_PRODUCTS = ("Gemm", "MatMul", "Conv")
_LOWEST = float(np.finfo(np.float32).min)  # masks use it for minus infinity
# operators between a mask and its softmax
_MASKING = "Add Cast Concat Expand Gather Identity Mul Reshape Slice Squeeze Tile Transpose Trilu Unsqueeze Where".split()


def apply_precision(
    model: ir.Model, precision: Precision, *, inputs: Iterable[str], keep: frozenset[str]
) -> dict[str, Precision]:
    """Rewrite a float32 graph in place, except the nodes named in `keep`; return the precision of each weight.

    `inputs` are the graph's inputs that are not weights. Raises PrecisionError with every constant that the precision cannot
    represent.
    """
    own = frozenset(inputs)
    weights = [value for value in model.graph.inputs if value.name not in own]
    if precision != "fp32":
        _Rewriter(model, precision, keep, weights).rewrite(own)
    names = {kind: name for name, kind in TYPES.items()}
    return {str(value.name): names[ir.DataType(value.dtype or 0)] for value in weights}


def sinusoid(graph: ir.Graph) -> set[ir.Node]:
    """Return the nodes of a positional sinusoid: all before a sine or cosine, and those after it up to a product with weights."""
    periodic = [node for node in graph if node.op_type in _PERIODIC]
    nodes: set[ir.Node] = set()
    before, after = list(periodic), list(periodic)
    while before:
        node = before.pop()
        nodes.add(node)
        producers = {value.producer() for value in node.inputs if value is not None}
        before += [producer for producer in producers if producer is not None and producer not in nodes]
    while after:
        node = after.pop()
        nodes.add(node)
        users = {user for value in node.outputs for user, _ in value.uses()}
        after += [user for user in users - nodes if user.op_type not in _PRODUCTS]
    return nodes


def logits(graph: ir.Graph) -> set[ir.Value]:
    """Return the values that end only in a softmax: logits and masks.

    Numbers far below the largest do not affect a softmax, so those beyond the precision may become its lowest number or minus
    infinity.
    """
    values: set[ir.Value] = set()
    for node in reversed(list(graph)):
        for value in (*node.outputs, *(source for source in node.inputs if source is not None)):
            users = [user for user, _ in value.uses()]
            if (
                not value.is_graph_output()
                and users
                and all(
                    user.op_type == "Softmax" or (user.op_type in _MASKING and values.issuperset(user.outputs)) for user in users
                )
            ):
                values.add(value)
    return values


def free_nodes(graph: ir.Graph, precision: Precision) -> list[ir.Node]:
    """Return the nodes with a choice, in graph order: their float32 outputs may also be of the precision."""
    fixed = sinusoid(graph)
    return [
        node
        for node in graph
        if node not in fixed
        and any(value.dtype == ir.DataType.FLOAT for value in node.outputs)
        and _admits_output(node, _OPSETS[precision], _type_name(precision))
    ]


def accepts_half(node: ir.Node, index: int, precision: Precision) -> bool:
    """Return whether input `index` of a node may be of the precision."""
    return _admits_input(node, index, _OPSETS[precision], _type_name(precision))


def lower_constant(numbers: Array, precision: Precision, *, mask: bool) -> tuple[Array, str | None]:
    """Return a constant in a precision, and a fault or None. `mask` says whether it is one of `logits`.

    The lowest float32, and numbers of a mask below the precision's range, become the precision's lowest; infinities stay.
    """
    least = -largest(precision)
    below = (numbers <= _LOWEST) | (mask & (numbers < least))
    finite = np.where(np.isinf(numbers) | below, 0, numbers)
    rounded, fault = in_precision(finite, precision)
    if not fault and np.any((rounded == 0) & (finite != 0)):
        fault = f"{np.min(np.abs(finite[finite != 0])):g} becomes zero in {precision}"
    clamped = np.where(below, np.asarray(least, rounded.dtype), rounded)
    infinite = np.where(np.isinf(numbers), np.copysign(np.float32(np.inf), numbers), 0).astype(rounded.dtype)
    return np.where(np.isinf(numbers), infinite, clamped), fault


def fill_value(node: ir.Node) -> Array:
    """Return the value of a ConstantOfShape, [1]."""
    value = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1, np.float32)
    return np.asarray(value)


def _type_name(precision: Precision) -> str:
    return f"tensor({TYPES[precision].name.lower()})"


def _admits_input(node: ir.Node, index: int, opset: int, kind: str) -> bool:
    formal = onnx.defs.get_schema(node.op_type, opset, "").inputs
    return kind in formal[min(index, len(formal) - 1)].types


def _admits_output(node: ir.Node, opset: int, kind: str) -> bool:
    formal = onnx.defs.get_schema(node.op_type, opset, "").outputs
    floats = [index for index, value in enumerate(node.outputs) if value.dtype == ir.DataType.FLOAT]
    return all(kind in formal[min(index, len(formal) - 1)].types for index in floats)


class _Rewriter:
    """Rewrite one graph. A value's type is its current precision; each value is cast at most once per type."""

    def __init__(self, model: ir.Model, precision: Precision, keep: frozenset[str], weights: list[ir.Value]) -> None:
        self.model, self.graph = model, model.graph
        self.precision, self.low, self.opset = precision, TYPES[precision], _OPSETS[precision]
        self.weights, self.kind, self.logits = weights, _type_name(precision), logits(self.graph)
        unknown = keep - {str(node.name) for node in self.graph}
        assert not unknown, f"no such nodes: {sorted(unknown)}"
        self.kept = sinusoid(self.graph) | {
            node for node in self.graph if node.name in keep or not _admits_output(node, self.opset, self.kind)
        }
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
        value = node.inputs[index]
        if node.op_type == "Shape" and value is not None:  # it does not read the numbers
            return ir.DataType(value.dtype or 0)
        return ir.DataType.FLOAT if node in self.kept or not _admits_input(node, index, self.opset, self.kind) else self.low

    def _as(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        """Return the value in a type: itself, a converted constant, or the output of a cast."""
        if value.dtype == kind:
            return value
        if (value, kind) not in self.converted:
            converted = self._converted_constant(value) if value.const_value is not None else self._cast(value, kind)
            self.converted[value, kind] = converted
        return self.converted[value, kind]

    def _cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        name = f"{value.name}.{kind.name.lower()}"
        output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(kind))
        cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(kind))], outputs=[output], name=f"cast.{name}")
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], cast)
        else:
            self.graph.insert_after(producer, cast)
        return output

    def _converted_constant(self, value: ir.Value) -> ir.Value:
        assert value.const_value is not None
        name = f"{value.name}.{self.low.name.lower()}"
        tensor = ir.tensor(self._lowered(value.const_value.numpy(), str(value.name), mask=value in self.logits), name=name)
        constant = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(self.low), const_value=tensor)
        self.graph.register_initializer(constant)
        return constant

    def _lowered(self, numbers: Array, where: str, *, mask: bool) -> Array:
        converted, fault = lower_constant(numbers, self.precision, mask=mask)
        if fault:
            self.faults.append(f"{where}: {fault}")
        return converted

    def _lower_outputs(self, node: ir.Node, floats: set[ir.Value]) -> None:
        for value in node.outputs:
            if value in floats:
                value.dtype = self.low
        if node.op_type == "Cast" and node.outputs[0] in floats:
            node.attributes["to"] = ir.AttrInt64("to", int(self.low))
        if node.op_type == "ConstantOfShape" and node.outputs[0] in floats:
            fill = self._lowered(fill_value(node), str(node.name), mask=node.outputs[0] in self.logits)
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(fill))

    def _raise_output(self, index: int, output: ir.Value) -> None:
        name = output.name
        output.name = f"{name}.{self.low.name.lower()}"
        cast = self._cast(output, ir.DataType.FLOAT)
        cast.name, cast.shape = name, output.shape
        self.graph.outputs[index] = cast
