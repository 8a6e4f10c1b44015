"""Rewrite upsampling convolutions with fewer products (sdruntime.backends.base.subpixel) in an OpenVINO model."""

from __future__ import annotations

from typing import Any

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.subpixel import PHASES, TAPS, pads

_INTERPOLATE = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor", "antialias": False}
_CONVOLUTION = {"strides": [1, 1], "dilations": [1, 1], "pads_begin": [1, 1], "pads_end": [1, 1]}


def split_upsampling(ov: Any, model: Any) -> int:
    """Replace each convolution that follows a 2x upsampling by four convolutions, and return how many were replaced."""
    count = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Convolution" and (image := _upsampled(node)) is not None:
            _split(ov, node, image)
            count += 1
    model.validate_nodes_and_infer_types()
    return count


def _upsampled(convolution: Any) -> Any | None:
    """Return the image before the 2x upsampling, or None if there is no upsampling or the weights are not constant."""
    resize, weights = (value.get_node() for value in convolution.input_values())
    if resize.get_type_name() != "Interpolate" or weights.get_type_name() != "Constant":
        return None
    scaling, conv = resize.get_attributes(), convolution.get_attributes()
    padded = any(scaling["pads_begin"] + scaling["pads_end"])
    plain = all(scaling.get(name) == value for name, value in _INTERPOLATE.items()) and not padded
    fits = all(conv.get(name) == value for name, value in _CONVOLUTION.items()) and list(weights.shape[2:]) == [3, 3]
    by_two = scaling["shape_calculation_mode"] == "scales" and _scales(resize) == {0: 1, 1: 1, 2: 2, 3: 2}
    return resize.input_value(0) if plain and fits and by_two else None


def _scales(resize: Any) -> dict[int, float] | None:
    """Return the scale factor of each of four axes (1 unless listed), or None if the factors are not constant."""
    scales, *axes = (value.get_node() for value in resize.input_values()[1:])
    if scales.get_type_name() != "Constant" or any(node.get_type_name() != "Constant" for node in axes):
        return None
    factors = [float(factor) for factor in scales.get_data()]
    listed = [int(axis) for axis in axes[0].get_data()] if axes else range(len(factors))
    return dict.fromkeys(range(4), 1.0) | dict(zip(listed, factors, strict=True))


def _split(ov: Any, convolution: Any, image: Any) -> None:
    """Replace a convolution of the upsampled `image`, and its bias, by four convolutions of `image`."""
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
    """Return the node that adds the bias, and the bias [1, channels, 1, 1]; or the convolution and None."""
    for user in convolution.output(0).get_target_inputs():
        add = user.get_node()
        if add.get_type_name() != "Add" or add.input_value(0).get_node().get_name() != convolution.get_name():
            continue
        bias = add.input_value(1).get_node()  # a Reshape of a constant, if it comes from ONNX
        bias = bias.input_value(0).get_node() if bias.get_type_name() == "Reshape" else bias
        if bias.get_type_name() == "Constant" and len(values := bias.get_data(dtype=np.float32).reshape(-1)) == channels:
            return add, values.reshape(1, -1, 1, 1)
    return convolution, None
