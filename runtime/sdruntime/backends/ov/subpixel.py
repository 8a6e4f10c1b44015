"""Rewrite upsampling convolutions with fewer products (sdruntime.backends.base.subpixel) in an OpenVINO model.

A UNet's upsampled image is cropped before the convolution if its size is odd: an If then runs the two as they were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.subpixel import PHASES, TAPS, pads

# in names of constants, between the name of the weight that they follow from and the part of it
NAMED, PHASE, WHOLE, BIAS = "/sdruntime.", "phase", "whole", "bias"
Own = Callable[[Array, str], Any]

_ASYMMETRIC = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
_INTERPOLATE = {"mode": "nearest", "antialias": False, **_ASYMMETRIC}
_CONVOLUTION = {"strides": [1, 1], "dilations": [1, 1], "pads_begin": [1, 1], "pads_end": [1, 1]}


def split_upsampling(ov: Any, model: Any) -> int:
    """Replace each convolution that follows a 2x upsampling by four convolutions, and return how many were replaced."""
    count = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Convolution":
            ends = _ends(node)
            if (image := _upsampled(node, node if ends is None else node.input_value(0).get_node())) is not None:
                _split(ov, node, image, ends)
                count += 1
    model.validate_nodes_and_infer_types()
    return count


def _ends(convolution: Any) -> Any | None:
    """Return where a Slice before a convolution ends the height and the width, or None if there is no such Slice."""
    crop = convolution.input_value(0).get_node()
    if crop.get_type_name() != "Slice" or crop.get_input_size() != 5:
        return None
    start, step, axes = (crop.input_value(k).get_node() for k in (1, 3, 4))
    if any(node.get_type_name() != "Constant" for node in (start, step, axes)):
        return None
    values = [[int(number) for number in node.get_data()] for node in (start, step, axes)]
    return crop.input_value(2) if values == [[0, 0], [1, 1], [2, 3]] else None


def _upsampled(convolution: Any, reader: Any) -> Any | None:
    """Return the image before the 2x upsampling that `reader` reads; None if there is none, or the weights are not constant."""
    resize, weights = reader.input_value(0).get_node(), convolution.input_value(1).get_node()
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


def _split(ov: Any, convolution: Any, image: Any, ends: Any | None) -> None:
    """Replace a convolution of the upsampled `image`, and its bias, by four convolutions of `image`; not if it is cropped."""
    opset, weights = ov.opset13, convolution.input_value(1).get_node()
    kernel = weights.get_data(dtype=np.float32)
    last, bias, name = _with_bias(convolution, len(kernel))
    own = functools.partial(_constant, opset, weights, name)
    if ends is None:
        whole = _phases(opset, own, image, kernel, bias)
    else:
        like = image.get_partial_shape(), image.get_element_type()
        small, other = (opset.parameter(shape=like[0], dtype=like[1]) for _ in range(2))
        stop = opset.parameter(shape=[2], dtype=np.int64)
        four = opset.result(_phases(opset, own, small, kernel, bias))
        two = opset.result(_cropped(opset, own, other, stop, kernel, bias))
        height_and_width = opset.gather(
            opset.shape_of(image, "i64"), opset.constant(np.array([2, 3], np.int64)), opset.constant(np.int64(0))
        )
        large = opset.multiply(height_and_width, opset.constant(np.array([2, 2], np.int64)))
        equal = opset.reduce_logical_and(opset.equal(large, ends), opset.constant(np.array([0], np.int64)))
        choice = opset.if_op(equal.output(0))
        choice.set_then_body(ov.Model([four], [small]))
        choice.set_else_body(ov.Model([two], [other, stop]))
        choice.set_input(image, small, other)
        choice.set_input(ends, None, stop)
        whole = choice.set_output(four, two).get_node()
    whole.set_friendly_name(last.get_friendly_name())
    last.output(0).replace(whole.output(0))


def _cropped(opset: Any, own: Own, image: Any, ends: Any, kernel: Array, bias: Array | None) -> Any:
    """Return the convolution of the upsampled and cropped `image`."""
    large = opset.interpolate(
        image, np.array([2, 2], np.float32), "nearest", "scales", **_ASYMMETRIC, axes=np.array([2, 3], np.int64)
    )
    corner, steps, axes = (opset.constant(np.array(numbers, np.int64)) for numbers in ([0, 0], [1, 1], [2, 3]))
    crop = opset.slice(large, corner, ends, steps, axes)
    summed = opset.convolution(crop, own(np.array(kernel), WHOLE), [1, 1], [1, 1], [1, 1], [1, 1])
    return summed if bias is None else opset.add(summed, own(bias, f"{BIAS}.{WHOLE}"))


def _phases(opset: Any, own: Own, image: Any, kernel: Array, bias: Array | None) -> Any:
    """Return the four convolutions of `image`, interleaved."""
    phases = []
    for p, q in PHASES:
        summed = own(np.ascontiguousarray(TAPS[p] @ kernel @ TAPS[q].T), f"{PHASE}.{p}{q}")
        phase = opset.convolution(image, summed, [1, 1], *pads(p, q), [1, 1])
        phases.append(phase if bias is None else opset.add(phase, own(bias, f"{BIAS}.{p}{q}")))
    return opset.depth_to_space(opset.concat(phases, 1), "blocks_first", 2)


def _constant(opset: Any, weights: Any, bias: str, values: Array, part: str) -> Any:
    """Return a constant of the weights' type, named after the weight that it follows from: `NAMED`."""
    constant = opset.constant(values, weights.get_element_type())
    constant.set_friendly_name(f"{bias if part.startswith(BIAS) else weights.get_friendly_name()}{NAMED}{part}")
    return constant


def _with_bias(convolution: Any, channels: int) -> tuple[Any, Array | None, str]:
    """Return the node that adds the bias, the bias [1, channels, 1, 1] and its name; or the convolution, None and ""."""
    for user in convolution.output(0).get_target_inputs():
        add = user.get_node()
        if add.get_type_name() != "Add" or add.input_value(0).get_node().get_name() != convolution.get_name():
            continue
        bias = add.input_value(1).get_node()  # a Reshape of a constant, if it comes from ONNX
        bias = bias.input_value(0).get_node() if bias.get_type_name() == "Reshape" else bias
        if bias.get_type_name() == "Constant" and len(values := bias.get_data(dtype=np.float32).reshape(-1)) == channels:
            return add, values.reshape(1, -1, 1, 1), bias.get_friendly_name()
    return convolution, None, ""
