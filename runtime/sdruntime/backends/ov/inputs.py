"""Open the optional inputs of an OpenVINO model: their defaults in the ONNX file make its reader take them for constants."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sdruntime.bundle.manifest import TensorSpec


def open_inputs(ov: Any, model: Any, tensors: Iterable[TensorSpec]) -> None:
    """Replace the constants named like `tensors` by inputs of the model, unless it has such inputs.

    Raises RuntimeError if one is missing.
    """
    present = {parameter.get_friendly_name() for parameter in model.get_parameters()}
    constants = {node.get_friendly_name(): node for node in model.get_ordered_ops() if node.get_type_name() == "Constant"}
    inputs = []
    for tensor in tensors:
        if tensor.name in present:
            continue
        if tensor.name not in constants:
            raise RuntimeError(f"the model has no input {tensor.name}")
        shape = ov.PartialShape([ov.Dimension(dim) if isinstance(dim, int) else ov.Dimension() for dim in tensor.shape])
        parameter = ov.op.Parameter(ov.Type.f32, shape)
        parameter.set_friendly_name(tensor.name)
        parameter.output(0).set_names({tensor.name})
        constants[tensor.name].output(0).replace(parameter.output(0))
        inputs.append(parameter)
    model.add_parameters(inputs)
    model.validate_nodes_and_infer_types()
