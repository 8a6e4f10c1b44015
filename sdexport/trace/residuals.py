"""Let a UNet take the residuals of ControlNets, in a graph that was traced without them.

diffusers adds a residual to a skip connection, which an up block joins to its input: to the second input of the Concat before
`up_blocks.i.resnets.j.conv_shortcut`. (Traced with residuals, the graph would read its sizes from one of them.)
"""

from __future__ import annotations

import re

import onnx_ir as ir

from sdexport.errors import ExportError
from sdexport.families.components import Component
from sdruntime.bundle.interface import is_residual

_SHORTCUT = re.compile(r"up_blocks\.(\d+)\.resnets\.(\d+)\.conv_shortcut\.weight")


def insert_residual(graph: ir.Graph, residual: ir.Value, component: Component) -> None:
    """Add a residual to the tensor that an up block joins. The component's optional inputs are in diffusers' order.

    Raises ExportError for a graph that is not as expected.
    """
    names = [spec.name for spec in component.optional_inputs if is_residual(spec.name)]
    joins, place = joins_of(graph), names.index(str(residual.name))
    if len(joins) != len(names) - 1:
        raise ExportError(f"{component.name}: the graph has {len(joins)} skip connections for {len(names) - 1} residuals")
    middle = place == len(joins)
    join, index = (joins[0], 0) if middle else (joins[-1 - place], 1)
    skip = join.inputs[index]
    assert skip is not None
    total = ir.node("Add", [skip, residual], name=f"add_{residual.name}")
    total.outputs[0].name, total.outputs[0].type, total.outputs[0].shape = f"with_{residual.name}", skip.type, skip.shape
    graph.insert_before(join, total)
    join.replace_input_with(index, total.outputs[0])


def joins_of(graph: ir.Graph) -> list[ir.Node]:
    """Return the Concat that joins each skip connection, in the order of the up blocks."""
    joins: dict[tuple[int, int], ir.Node] = {}
    for value in graph.inputs:
        if match := _SHORTCUT.fullmatch(str(value.name)):
            [(convolution, _)] = value.uses()
            source = convolution.inputs[0]
            join = None if source is None else source.producer()
            if join is not None and join.op_type == "Concat" and len(join.inputs) == 2:
                joins[int(match[1]), int(match[2])] = join
    return [joins[place] for place in sorted(joins)]
