"""How two or three weights become one. All compute in float32, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import numpy as np

from sdexport.checkpoint.weights.safetensors import Array

Method = Literal["weighted", "add-difference", "slerp"]
METHODS: tuple[Method, ...] = get_args(Method)
_PARALLEL = 0.9995  # cosine from which the arc is as good as its chord


def weighted(weight: float, first: Array, second: Array) -> Array:
    """Return (1 - weight)·A + weight·B."""
    return np.asarray(first + np.float32(weight) * (second - first))


def slerp(weight: float, first: Array, second: Array) -> Array:
    """Return the point at `weight` of the arc from A to B, each taken as one vector (Shoemake 1985, "Animating rotation").

    For weights that are almost parallel, or zero, the arc is the line between them.
    """
    a, b = first.ravel().astype(np.float64), second.ravel().astype(np.float64)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = float(a @ b / norms) if norms else 1.0
    if abs(cosine) > _PARALLEL:
        return weighted(weight, first, second)
    angle = np.arccos(np.clip(cosine, -1, 1))
    mixed = (np.sin((1 - weight) * angle) * a + np.sin(weight * angle) * b) / np.sin(angle)
    return np.asarray(mixed.astype(np.float32).reshape(first.shape))


def add_difference(weight: float, first: Array, second: Array, third: Array) -> Array:
    """Return A + weight·(B - C). If A has more input channels than B and C, as for inpainting, the further ones stay."""
    result: Array = first.copy()
    same = result if first.shape == second.shape else result[:, : second.shape[1]]
    same += np.float32(weight) * (second - third)
    return result


COMPUTE: Mapping[Method, Callable[..., Array]] = {"weighted": weighted, "slerp": slerp, "add-difference": add_difference}
