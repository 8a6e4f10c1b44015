"""Let a UNet attend to the tokens of images, in a graph that was traced without them: decoupled cross-attention.

IP-Adapter, Ye et al. 2023 (arXiv 2308.06721), section 3.2.2. Each cross-attention gets a copy of its own nodes, from the keys and
values to the result, with the adapter's weights in place of the text's. The copy's result, times the scale, is added.
"""

from __future__ import annotations

import onnx_ir as ir

from sdexport.checkpoint.weights.ip_adapter import attentions, name
from sdexport.errors import ExportError
from sdexport.families.components import Component
from sdruntime.bundle.interface import IMAGE_BIAS, IMAGE_SCALE, IMAGE_TOKENS


def insert_image_prompt(graph: ir.Graph, component: Component) -> None:
    """Add the attention to the inputs IMAGE_TOKENS, IMAGE_BIAS and IMAGE_SCALE. Raises ExportError for another graph.

    The new weights become inputs of the graph, as the others are.
    """
    inputs = {str(value.name): value for value in graph.inputs}
    tokens, bias, scale = _prepared(graph, [inputs[tensor] for tensor in (IMAGE_TOKENS, IMAGE_BIAS, IMAGE_SCALE)])
    width = inputs[IMAGE_TOKENS].shape
    assert width is not None
    places = attentions(inputs)
    if not places:
        raise ExportError(f"{component.name}: the graph has no cross-attention")
    for place in places:
        keys, values, out = (_product(inputs, f"{place}.{part}.weight") for part in ("to_k", "to_v", "to_out.0"))
        result = out.inputs[0]
        assert result is not None
        added: list[ir.Node] = []
        copies: dict[ir.Value, ir.Value] = {}
        for letter, product in (("k", keys), ("v", values)):
            rows = inputs[f"{place}.to_{letter}.weight"].shape
            assert rows is not None
            weight = ir.Value(
                name=name(place, letter), type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([rows[0], width[2]])
            )
            graph.inputs.append(weight)
            turned = _node("Transpose", [weight], f"{weight.name}.turned", ir.Shape([width[2], rows[0]]), perm=[1, 0])
            copies[product.outputs[0]] = (
                one := _node("MatMul", [tokens, turned.outputs[0]], f"{weight.name}.product", ir.Shape([None, None, rows[0]]))
            ).outputs[0]
            added += [turned, one]
        attended = _copy(result, copies, _between([keys, values], out), bias, added)
        weighed = _node("Mul", [attended, scale], f"{place}.image_scaled", result.shape)
        total = _node("Add", [result, weighed.outputs[0]], f"{place}.with_image", result.shape)
        graph.insert_before(out, [*added, weighed, total])
        out.replace_input_with(0, total.outputs[0])


def _prepared(graph: ir.Graph, inputs: list[ir.Value]) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return the tokens, the bias and the scale for all layers.

    Their defaults have one row, which the tokens' projections cannot broadcast.
    """
    tokens, bias, scale = inputs
    ones, axes = (
        ir.Value(
            name=f"image_prompt.{what}",
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape([2]),
            const_value=ir.tensor(numbers, dtype=ir.DataType.INT64, name=f"image_prompt.{what}"),
        )
        for what, numbers in (("ones", [1, 1]), ("axes", [1, 2]))
    )
    for value in (ones, axes):
        graph.register_initializer(value)
    batch = _node("Shape", [graph.inputs[0]], "image_prompt.batch", ir.Shape([1]), ir.DataType.INT64, start=0, end=1)
    shape = _node("Concat", [batch.outputs[0], ones], "image_prompt.shape", ir.Shape([3]), ir.DataType.INT64, axis=0)
    width = tokens.shape
    assert width is not None
    all_rows = _node("Expand", [tokens, shape.outputs[0]], "image_prompt.tokens", ir.Shape([None, None, width[2]]))
    wide = [
        _node("Unsqueeze", [value, axes], f"{value.name}.wide", ir.Shape([None, 1, 1, None][: 4 if value is bias else 3]))
        for value in (bias, scale)
    ]
    graph.insert_before(graph[0], [batch, shape, all_rows, *wide])
    return all_rows.outputs[0], wide[0].outputs[0], wide[1].outputs[0]


def _product(inputs: dict[str, ir.Value], weight: str) -> ir.Node:
    """Return the MatMul with a weight of a linear layer, whose axes a Transpose exchanges first."""
    turned = _only_use(inputs[weight], "Transpose", weight)
    return _only_use(turned.outputs[0], "MatMul", weight)


def _only_use(value: ir.Value, kind: str, weight: str) -> ir.Node:
    nodes = [node for node, _ in value.uses()]
    if [node.op_type for node in nodes] != [kind]:
        raise ExportError(f"{weight}: expected one {kind}, and the graph has {', '.join(node.op_type for node in nodes)}")
    return nodes[0]


def _between(first: list[ir.Node], last: ir.Node) -> set[ir.Node]:
    """Return the nodes that follow one of the first nodes and come before the last."""
    following: set[ir.Node] = set()
    waiting = list(first)
    while waiting:
        for output in waiting.pop().outputs:
            for node, _ in output.uses():
                if node is not last and node not in following:
                    following.add(node)
                    waiting.append(node)
    return following


def _copy(
    value: ir.Value, copies: dict[ir.Value, ir.Value], nodes: set[ir.Node], bias: ir.Value, added: list[ir.Node]
) -> ir.Value:
    """Return the copy of a value, after copying the nodes that it depends on; those that are not among `nodes` are shared."""
    node = value.producer()
    if value in copies or node is None or node not in nodes:
        return copies.get(value, value)
    inputs = [None if source is None else _copy(source, copies, nodes, bias, added) for source in node.inputs]
    if node.op_type == "Softmax":
        scores = node.inputs[0]
        assert scores is not None
        added.append(_node("Add", [inputs[0], bias], f"{node.name}.image_bias", _any_length(scores.shape)))
        inputs = [added[-1].outputs[0]]
    copied = ir.node(
        node.op_type, inputs, attributes=dict(node.attributes), num_outputs=len(node.outputs), name=f"{node.name}.image"
    )
    for ours, theirs in zip(copied.outputs, node.outputs, strict=True):
        ours.name, ours.type, ours.shape = f"{theirs.name}.image", theirs.type, _any_length(theirs.shape)
        copies[theirs] = ours
    added.append(copied)
    return copies[value]


def _any_length(shape: ir.Shape | None) -> ir.Shape | None:
    """Return a shape in which the number of tokens is not known: it was that of the text."""
    if shape is None:
        return None
    return ir.Shape([None if isinstance(dim, ir.SymbolicDim) and dim.value == "sequence" else dim for dim in shape])


def _node(
    kind: str,
    inputs: list[ir.Value | None] | list[ir.Value],
    name: str,
    shape: ir.Shape | None,
    dtype: ir.DataType = ir.DataType.FLOAT,
    **attributes: object,
) -> ir.Node:
    node = ir.node(kind, inputs, attributes=attributes, name=name)  # type: ignore[arg-type]
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, ir.TensorType(dtype), shape
    return node
