"""Let a UNet take the features of T2I-Adapters, in a graph that was traced without them.

diffusers adds a feature to what leaves the last layer of a down block with attention, before its downsampler, or to what leaves a
whole block without. Either is also a skip connection, which takes part with the feature. One more is added to the middle.
"""

from __future__ import annotations

import onnx_ir as ir

from sdexport.checkpoint.configs.controlnet import as_list
from sdexport.errors import ExportError
from sdexport.families.components import Component
from sdexport.trace.residuals import joins_of


def insert_feature(graph: ir.Graph, feature: ir.Value, component: Component, place: int) -> None:
    """Add the feature of a down block, or after the last block that of the middle, to everything that reads its output.

    Call this before residuals are inserted. Raises ExportError for a graph that is not as expected.
    """
    joins, blocks = joins_of(graph), len(component.config["block_out_channels"])
    last = _last_skips(component)
    if len(joins) != last[-1] + 1:
        raise ExportError(f"{component.name}: the graph has {len(joins)} skip connections, and its blocks leave {last[-1] + 1}")
    output = joins[0].inputs[0] if place == blocks else joins[-1 - last[place]].inputs[1]
    assert output is not None
    total = ir.node("Add", [output, feature], name=f"add_{feature.name}")
    total.outputs[0].name, total.outputs[0].type, total.outputs[0].shape = f"with_{feature.name}", output.type, output.shape
    ir.convenience.replace_all_uses_with(output, total.outputs[0])
    total.replace_input_with(0, output)
    producer = output.producer()
    assert producer is not None
    graph.insert_after(producer, total)


def _last_skips(component: Component) -> list[int]:
    """Return which skip connection, in the order of the down blocks, each block's feature is added to."""
    config = component.config
    kinds, layers = config["down_block_types"], as_list(config["layers_per_block"])
    layers = layers * len(kinds) if len(layers) == 1 else layers
    places, skip = [], 0  # that of the first convolution
    for index, (kind, count) in enumerate(zip(kinds, layers, strict=True)):
        downsampled = index < len(kinds) - 1
        skip += count + downsampled
        places.append(skip - (downsampled and "Attn" in kind))
    return places
