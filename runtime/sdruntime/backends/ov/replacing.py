"""Replace constants of an OpenVINO model, which have the names of the weights in the component's ONNX model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.subpixel import TAPS
from sdruntime.backends.base.weights import Weights, check_found
from sdruntime.backends.ov.subpixel import BIAS, NAMED, PHASE


def replace_weights(ov: Any, model: Any, weights: Weights) -> None:
    """Replace the constants that follow from new weights. Raises ValueError with the weights that the model does not have."""
    missing, constants = set(weights.names), list[tuple[Any, str, str]]()
    for node in _constants(model):
        weight, _, part = node.get_friendly_name().partition(NAMED)
        if weight in weights.names:
            missing.discard(weight)
            constants.append((node, weight, part))
    check_found(missing)
    with weights.lending() as lent:
        for node, weight, part in constants:
            _replace(ov, node, _made(lent, weight, part))


def _constants(model: Any) -> Iterator[Any]:
    for node in model.get_ordered_ops():
        if node.get_type_name() == "If":
            for body in (node.get_then_body(), node.get_else_body()):
                yield from _constants(body)
        if node.get_type_name() == "Constant":
            yield node


def _made(lent: Mapping[str, Array], weight: str, part: str) -> Array:
    if part.startswith(PHASE):
        p, q = int(part[-2]), int(part[-1])
        return np.asarray(TAPS[p] @ lent[weight] @ TAPS[q].T)
    return lent[weight].reshape(1, -1, 1, 1) if part.startswith(BIAS) else lent[weight]


def _replace(ov: Any, node: Any, values: Array) -> None:
    if list(node.shape) != list(values.shape):
        raise ValueError(f"{node.get_friendly_name()} is {list(node.shape)}, and the new weight gives {list(values.shape)}")
    new = ov.opset13.constant(np.ascontiguousarray(values), node.get_element_type())
    new.set_friendly_name(node.get_friendly_name())
    node.output(0).replace(new.output(0))
