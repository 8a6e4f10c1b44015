"""Add the optional inputs of a component to its traced graph. With zeros in them, it computes what it did without them.

They are no part of the trace, so that a UNet with and one without them share a cached trace.

In a finished file each has a default, an initialiser of the same name, so that other programs need not know it. It is a single
zero, as wide as the operators' broadcasting allows; hence the file states no sizes for the input.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sdexport.errors import ExportError
from sdexport.families.components import Component
from sdexport.trace.features import insert_feature
from sdexport.trace.image_prompt import insert_image_prompt
from sdexport.trace.residuals import insert_residual
from sdruntime.bundle.interface import FEATURE, IMAGE_MASKS, IMAGE_PROMPT, IMAGE_TOKENS, TOKEN_VECTORS, is_residual

_TABLE = "token_embedding.weight"


def add_optional_inputs(model: ir.Model, component: Component) -> None:
    """Insert the component's optional inputs after its others, and the nodes that use them."""
    graph = model.graph
    for place, spec in enumerate(component.optional_inputs, start=len(component.inputs)):
        value = ir.Value(name=spec.name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(spec.shape))
        graph.inputs.insert(place, value)
        if spec.name == TOKEN_VECTORS:
            _insert_token_vectors(graph, value, component)
        elif spec.name.startswith(FEATURE):
            insert_feature(graph, value, component, int(spec.name.removeprefix(FEATURE)))
        elif is_residual(spec.name):
            insert_residual(graph, value, component)
    if any(spec.name in IMAGE_PROMPT for spec in component.optional_inputs):  # which need each other
        insert_image_prompt(graph, component)


def add_defaults(model: ir.Model, component: Component) -> None:
    """Give the optional inputs their defaults. Call this last: the other passes take an initialiser for a constant."""
    shapes = {spec.name: spec.shape for spec in component.optional_inputs}
    images = next((shape[-1] for name, shape in shapes.items() if name in IMAGE_MASKS.values()), 1)
    assert isinstance(images, int)
    for value in (value for value in model.graph.inputs if value.name in shapes):
        sizes = [1] * len(value.shape or ())
        if value.name in (IMAGE_TOKENS, *IMAGE_MASKS.values()) and value.shape is not None:
            last = value.shape[-1]
            assert isinstance(last, int)
            sizes[-1] = last  # which a product, or a shape in the graph, does not broadcast
        value.shape = ir.Shape([f"{value.name}.{axis}" if size == 1 else size for axis, size in enumerate(sizes)])
        if value.name == IMAGE_TOKENS:
            sizes[1] = images  # the graph splits the tokens by image
        value.const_value = ir.tensor(np.zeros(sizes, np.float32), name=value.name)
        model.graph.register_initializer(value)


def _insert_token_vectors(graph: ir.Graph, vectors: ir.Value, component: Component) -> None:
    """Let the ids from the size of the vocabulary on stand for the vector at their position, instead of a row of the table.

    Textual inversion, Gal et al. 2022 (arXiv 2208.01618), section 4. The pooled output of the second text encoder is that of the
    largest id in some checkpoints, so the graph gets the ids as they are.
    """
    lookups = [
        node
        for node in graph
        if node.op_type == "Gather" and node.inputs[0] is not None and str(node.inputs[0].name).endswith(_TABLE)
    ]
    if len(lookups) != 1:
        raise ExportError(f"{component.name}: expected one lookup in {_TABLE}, and the graph has {len(lookups)}")
    lookup = lookups[0]
    ids, rows = lookup.inputs[1], lookup.outputs[0]
    assert ids is not None
    kind = ir.DataType(ids.dtype or 0)
    size = int(component.config["vocab_size"])
    last, first = (constant(graph, name, [number], kind) for name, number in (("last_id", size - 1), ("first_id", size)))
    axis = constant(graph, "last_axis", [-1])
    known = ir.node("Min", [ids, last])
    replaced = ir.node("GreaterOrEqual", [ids, first])
    column = ir.node("Unsqueeze", [replaced.outputs[0], axis])
    chosen = ir.node("Where", [column.outputs[0], vectors, rows])
    for node, dtype, shape in (
        (known, kind, ids.shape),
        (replaced, ir.DataType.BOOL, ids.shape),
        (column, ir.DataType.BOOL, None if ids.shape is None else ir.Shape([*ids.shape, 1])),
        (chosen, ir.DataType.FLOAT, rows.shape),
    ):
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), shape
        node.name = node.outputs[0].name = f"{vectors.name}.{node.op_type}"
    ir.convenience.replace_all_uses_with(rows, chosen.outputs[0])
    chosen.replace_input_with(2, rows)
    lookup.replace_input_with(1, known.outputs[0])
    graph.insert_before(lookup, [known])
    graph.insert_after(lookup, [replaced, column, chosen])


def constant(graph: ir.Graph, name: str, numbers: list[int], kind: ir.DataType = ir.DataType.INT64) -> ir.Value:
    """Add a constant [n] of whole numbers to the graph."""
    tensor = ir.tensor(numbers, dtype=kind, name=name)
    value = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape([len(numbers)]), const_value=tensor)
    graph.register_initializer(value)
    return value
