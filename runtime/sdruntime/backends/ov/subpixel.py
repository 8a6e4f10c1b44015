"""Upsampling convolutions in fewer products (sdruntime.backends.base.subpixel), in a graph of OpenVINO's."""

from __future__ import annotations

from typing import Any

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.subpixel import PHASES, TAPS, pads

_INTERPOLATE = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor", "antialias": False}
_CONVOLUTION = {"strides": [1, 1], "dilations": [1, 1], "pads_begin": [1, 1], "pads_end": [1, 1]}


def split_upsampling(ov: Any, model: Any) -> int:
    """Put four convolutions in the place of each one after an upsampling by two, and say how many were found."""
    found = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Convolution" and (image := _upsampled(node)) is not None:
            _split(ov, node, image)
            found += 1
    model.validate_nodes_and_infer_types()
    return found


def _upsampled(convolution: Any) -> Any | None:
    """The small image, where the convolution's is that upsampled by two and its weights are known."""
    resize, weights = (each.get_node() for each in convolution.input_values())
    if resize.get_type_name() != "Interpolate" or weights.get_type_name() != "Constant":
        return None
    has, wants = resize.get_attributes(), convolution.get_attributes()
    plain = all(has.get(name) == value for name, value in _INTERPOLATE.items()) and not any(has["pads_begin"] + has["pads_end"])
    fits = all(wants.get(name) == value for name, value in _CONVOLUTION.items()) and list(weights.shape[2:]) == [3, 3]
    by_two = has["shape_calculation_mode"] == "scales" and _scales(resize) == {0: 1, 1: 1, 2: 2, 3: 2}
    return resize.input_value(0) if plain and fits and by_two else None


def _scales(resize: Any) -> dict[int, float] | None:
    """Axis -> factor, 1 for an axis that is not named."""
    scales, *axes = (each.get_node() for each in resize.input_values()[1:])
    if scales.get_type_name() != "Constant" or any(each.get_type_name() != "Constant" for each in axes):
        return None
    factors = [float(each) for each in scales.get_data()]
    named = [int(each) for each in axes[0].get_data()] if axes else range(len(factors))
    return dict.fromkeys(range(4), 1.0) | dict(zip(named, factors, strict=True))


def _split(ov: Any, convolution: Any, image: Any) -> None:
    opset, weights = ov.opset13, convolution.input_value(1).get_node()
    kernel = weights.get_data(dtype=np.float32)
    last, bias = _with_bias(convolution, len(kernel))
    phases = []
    for p, q in PHASES:
        summed = opset.constant(np.ascontiguousarray(TAPS[p] @ kernel @ TAPS[q].T), weights.get_element_type())
        phase = opset.convolution(image, summed, [1, 1], *pads(p, q), [1, 1])
        phases.append(phase if bias is None else opset.add(phase, opset.constant(bias, weights.get_element_type())))
    whole = opset.depth_to_space(opset.concat(phases, 1), "blocks_first", 2)
    whole.set_friendly_name(last.get_friendly_name())
    last.output(0).replace(whole.output(0))


def _with_bias(convolution: Any, channels: int) -> tuple[Any, Array | None]:
    """The node that adds a bias to the convolution's result, and the bias [1, channels, 1, 1]; else the convolution itself."""
    for user in convolution.output(0).get_target_inputs():
        add = user.get_node()
        if add.get_type_name() != "Add" or add.input_value(0).get_node().get_name() != convolution.get_name():
            continue
        bias = add.input_value(1).get_node()  # from ONNX it comes as a reshaped constant
        bias = bias.input_value(0).get_node() if bias.get_type_name() == "Reshape" else bias
        if bias.get_type_name() == "Constant" and len(values := bias.get_data(dtype=np.float32).reshape(-1)) == channels:
            return add, values.reshape(1, -1, 1, 1)
    return convolution, None
