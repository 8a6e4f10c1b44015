"""Resize latents as torch.nn.functional.interpolate does, without antialiasing: the web UI's upscalers of latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sdruntime.arrays import Array

Kernel = Literal["bilinear", "bicubic", "nearest", "nearest-exact"]
Matrix = NDArray[np.float64]


def resized(latents: Array, size: tuple[int, int], kernel: Kernel) -> Array:
    """Return latents float32 [C, h, w] at `size`, (height, width)."""
    down, across = (_MATRICES[kernel](old, new) for old, new in zip(latents.shape[1:], size, strict=True))
    result: Array = (down @ latents.astype(np.float64) @ across.T).astype(np.float32)
    return result


def _nearest(old: int, new: int) -> Matrix:
    return _picked(np.arange(new, dtype=np.float32) * np.float32(old / new), old)


def _nearest_exact(old: int, new: int) -> Matrix:
    return _picked((np.arange(new, dtype=np.float32) + np.float32(0.5)) * np.float32(old / new), old)


def _picked(places: NDArray[np.float32], old: int) -> Matrix:
    return np.eye(old)[np.minimum(places.astype(np.int64), old - 1)]


def _bilinear(old: int, new: int) -> Matrix:
    return _weighted(np.maximum(_centres(old, new), 0), old, lambda part: [1 - part, part], first=0)


def _bicubic(old: int, new: int) -> Matrix:
    return _weighted(_centres(old, new), old, lambda part: [_cubic(np.abs(part - k)) for k in range(-1, 3)], first=-1)


def _centres(old: int, new: int) -> Matrix:
    """Return where the middle of each new cell lies between those of the old cells."""
    centres: Matrix = (np.arange(new, dtype=np.float64) + 0.5) * (old / new) - 0.5
    return centres


def _weighted(places: Matrix, old: int, weights: Callable[[Matrix], list[Matrix]], *, first: int) -> Matrix:
    below = np.floor(places)
    matrix = np.zeros((len(places), old))
    for k, weight in enumerate(weights(places - below), start=first):
        np.add.at(matrix, (np.arange(len(places)), np.clip(below + k, 0, old - 1).astype(np.int64)), weight)
    return matrix


def _cubic(x: Matrix) -> Matrix:
    a = -0.75
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x <= 1, near, far)


_MATRICES: Mapping[Kernel, Callable[[int, int], Matrix]] = {
    "bilinear": _bilinear,
    "bicubic": _bicubic,
    "nearest": _nearest,
    "nearest-exact": _nearest_exact,
}
