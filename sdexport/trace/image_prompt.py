"""Let a UNet attend to the tokens of images, in a graph that was traced without them: decoupled cross-attention.

IP-Adapter, Ye et al. 2023 (arXiv 2308.06721), section 3.2.2. Each cross-attention gets a copy of its own nodes, from the keys and
values to the result, with the adapter's weights in place of the text's. The copy's result, times the scale, is added.

All images share one softmax. With masks, each has a softmax of its own, whose attention counts where its mask is (diffusers'
IPAdapterAttnProcessor2_0). Both are computed, and each row of a call takes one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from sdexport.checkpoint.weights.ip_adapter import attentions, divisor, name
from sdexport.errors import ExportError
from sdexport.families.components import Component
from sdruntime.bundle.interface import IMAGE_BIAS, IMAGE_MASKED, IMAGE_MASKS, IMAGE_SCALE, IMAGE_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    """What all layers have in common. `tokens`: [B, M N, D], of M images; `bias`: [B, 1, 1, M N]; `scale`: [B, 1, 1]; `masked`:
    bool [B, 1, 1, 1]; `masks`: [B, 1, Q, M, 1] by divisor, for Q places; `by_image`, `joined`: the shapes of scores
    [B, H, Q, M, N] and [B, H, Q, M N].
    """

    tokens: ir.Value
    bias: ir.Value
    scale: ir.Value
    masked: ir.Value
    masks: Mapping[int, ir.Value]
    by_image: ir.Value
    joined: ir.Value


def insert_image_prompt(graph: ir.Graph, component: Component) -> None:
    """Add the attention to the inputs sdruntime.bundle.interface.IMAGE_PROMPT. Raises ExportError for another graph.

    The new weights become inputs of the graph, as the others are.
    """
    inputs = {str(value.name): value for value in graph.inputs}
    prompt = _prepared(graph, inputs)
    width = inputs[IMAGE_TOKENS].shape
    assert width is not None
    places, levels = attentions(inputs), len(component.config["down_block_types"])
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
                one := _node(
                    "MatMul", [prompt.tokens, turned.outputs[0]], f"{weight.name}.product", ir.Shape([None, None, rows[0]])
                )
            ).outputs[0]
            added += [turned, one]
        attended = _copy(result, copies, _between([keys, values], out), prompt, divisor(place, levels), added)
        weighed = _node("Mul", [attended, prompt.scale], f"{place}.image_scaled", result.shape)
        total = _node("Add", [result, weighed.outputs[0]], f"{place}.with_image", result.shape)
        graph.insert_before(out, [*added, weighed, total])
        out.replace_input_with(0, total.outputs[0])


def _prepared(graph: ir.Graph, inputs: Mapping[str, ir.Value]) -> _Prompt:
    """Insert the nodes that all layers have in common.

    The tokens' default has one row, which their projections cannot broadcast, and one token for each image.
    """
    tokens, bias, scale, masked = (inputs[tensor] for tensor in (IMAGE_TOKENS, IMAGE_BIAS, IMAGE_SCALE, IMAGE_MASKED))
    masks = {number: inputs[tensor] for number, tensor in IMAGE_MASKS.items() if tensor in inputs}
    images, width = _last(next(iter(masks.values()))), _last(tokens)
    nodes: list[ir.Node] = []

    def add(kind: str, sources: Sequence[ir.Value], name: str, *dims: int | None, **attributes: object) -> ir.Value:
        dtype = attributes.pop("dtype", ir.DataType.FLOAT)
        assert isinstance(dtype, ir.DataType)
        nodes.append(_node(kind, list(sources), name, ir.Shape(dims), dtype, **attributes))
        return nodes[-1].outputs[0]

    ones, three = _numbers(graph, "ones", 1, 1), _numbers(graph, "axes_of_three", 1, 2, 3)
    batch = add("Shape", [graph.inputs[0]], "image_prompt.batch", 1, dtype=ir.DataType.INT64, start=0, end=1)
    shape = add("Concat", [batch, ones], "image_prompt.shape", 3, dtype=ir.DataType.INT64, axis=0)
    two, layout = _numbers(graph, "axes", 1, 2), _numbers(graph, "layout", 0, 1, -1, images, 1)
    flag = add("Unsqueeze", [masked, three], f"{IMAGE_MASKED}.wide", None, 1, 1, 1)
    prompt = _Prompt(
        tokens=add("Expand", [tokens, shape], "image_prompt.tokens", None, None, width),
        bias=add("Unsqueeze", [bias, two], f"{IMAGE_BIAS}.wide", None, 1, 1, None),
        scale=add("Unsqueeze", [scale, two], f"{IMAGE_SCALE}.wide", None, 1, 1),
        masked=add("Greater", [flag, _zero(graph)], f"{IMAGE_MASKED}.above", None, 1, 1, 1, dtype=ir.DataType.BOOL),
        masks={
            number: add("Reshape", [mask, layout], f"{mask.name}.wide", None, 1, None, images, 1)
            for number, mask in masks.items()
        },
        by_image=_numbers(graph, "by_image", 0, 0, 0, images, -1),
        joined=_numbers(graph, "joined", 0, 0, 0, -1),
    )
    graph.insert_before(graph[0], nodes)
    return prompt


def _last(value: ir.Value) -> int:
    shape = value.shape
    assert shape is not None
    size = shape[-1]
    assert isinstance(size, int)
    return size


def _numbers(graph: ir.Graph, what: str, *numbers: int) -> ir.Value:
    """Return a constant int64 of the graph."""
    return _constant(graph, ir.tensor(numbers, dtype=ir.DataType.INT64, name=f"image_prompt.{what}"), len(numbers))


def _zero(graph: ir.Graph) -> ir.Value:
    return _constant(graph, ir.tensor(0.0, dtype=ir.DataType.FLOAT, name="image_prompt.zero"))


def _constant(graph: ir.Graph, tensor: ir.TensorProtocol, *dims: int) -> ir.Value:
    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(dims), const_value=tensor)
    graph.register_initializer(value)
    return value


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
    value: ir.Value, copies: dict[ir.Value, ir.Value], nodes: set[ir.Node], prompt: _Prompt, size: int, added: list[ir.Node]
) -> ir.Value:
    """Return the copy of a value, after copying the nodes that it depends on; those that are not among `nodes` are shared."""
    node = value.producer()
    if value in copies or node is None or node not in nodes:
        return copies.get(value, value)
    inputs = [None if source is None else _copy(source, copies, nodes, prompt, size, added) for source in node.inputs]
    if node.op_type == "Softmax":
        scores = node.inputs[0]
        assert scores is not None
        added.append(_node("Add", [inputs[0], prompt.bias], f"{node.name}.image_bias", _any_length(scores.shape)))
        inputs = [added[-1].outputs[0]]
    copied = ir.node(
        node.op_type, inputs, attributes=dict(node.attributes), num_outputs=len(node.outputs), name=f"{node.name}.image"
    )
    for ours, theirs in zip(copied.outputs, node.outputs, strict=True):
        ours.name, ours.type, ours.shape = f"{theirs.name}.image", theirs.type, _any_length(theirs.shape)
        copies[theirs] = ours
    added.append(copied)
    if node.op_type == "Softmax":
        copies[node.outputs[0]] = _masked(copied, prompt, size, added)
    return copies[value]


def _masked(softmax: ir.Node, prompt: _Prompt, size: int, added: list[ir.Node]) -> ir.Value:
    """Return the weights of the tokens, [B, H, Q, M N]: of a softmax over all, or with masks of one for each image."""
    scores, weights = softmax.inputs[0], softmax.outputs[0]
    parts = ir.Shape([None] * 5)
    for kind, others, suffix, shape in (
        ("Reshape", [prompt.by_image], "by_image", parts),
        ("Softmax", [], "each", parts),
        ("Mul", [prompt.masks[size]], "times_mask", parts),
        ("Reshape", [prompt.joined], "joined", weights.shape),
    ):
        added.append(_node(kind, [scores, *others], f"{softmax.name}.{suffix}", shape))
        scores = added[-1].outputs[0]
    added.append(_node("Where", [prompt.masked, scores, weights], f"{softmax.name}.masked", weights.shape))
    return added[-1].outputs[0]


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
