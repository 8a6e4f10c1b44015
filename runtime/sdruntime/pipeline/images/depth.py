"""Depth maps: for each pixel a number, larger where it is nearer, of any scale."""

from __future__ import annotations

from typing import Any

import numpy as np

from sdruntime.arrays import Array
from sdruntime.errors import LibraryMissing, SettingError
from sdruntime.pipeline.images.imagefile import ImageLike, gray_from

_A = -0.75  # of torch's bicubic convolution
_SIDE = 16_384


def depth_from(depth: ImageLike | Array) -> Array:
    """Return a depth map as float32 [H, W]: an array of numbers [H, W], or the gray of an image.

    Raises SettingError, LibraryMissing for an image file that needs Pillow.
    """
    array: Any = np.asarray(depth) if hasattr(depth, "__array__") else None
    if array is None or array.ndim != 2 or array.dtype.kind not in "uif":
        try:
            array = gray_from(depth)
        except (SettingError, LibraryMissing) as error:
            raise type(error)(f"depth: {str(error).removeprefix('image: ')}") from error
    if not array.size or max(array.shape) > _SIDE:
        raise SettingError(f"depth: it is {array.shape[1]}x{array.shape[0]}; a side has 1 to {_SIDE:,} numbers")
    with np.errstate(over="ignore"):
        numbers: Array = array.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise SettingError("depth: some of its numbers are NaN or infinite: replace them, such as by the largest distance")
    return numbers


def normalized(depth: Array, height: int, width: int) -> Array:
    """Return a depth map resized to float32 [height, width] and scaled to -1 … 1, as diffusers' StableDiffusionDepth2ImgPipeline.

    Raises SettingError if it is the same everywhere.
    """
    resized = _bicubic(_bicubic(depth, height, 0), width, 1)
    low, high = resized.min(), resized.max()
    if not high > low:
        raise SettingError(f"depth: it is {low:g} everywhere: the model needs near and far")
    scaled: Array = np.float32(2) * (resized - low) / (high - low) - np.float32(1)
    return scaled.astype(np.float32)


def _bicubic(array: Array, size: int, axis: int) -> Array:
    """Resize along an axis as torch's interpolate(mode="bicubic", align_corners=False): without a filter against aliasing."""
    before = array.shape[axis]
    places = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(before / size) - np.float32(0.5)
    first = np.floor(places).astype(np.int64)
    far = places - first
    weights = [_outer(far + 1), _inner(far), _inner(1 - far), _outer(2 - far)]
    shape = (-1, 1) if axis == 0 else (1, -1)
    taps = (np.take(array, np.clip(first + tap, 0, before - 1), axis) for tap in (-1, 0, 1, 2))
    resized: Array = sum(tap * weight.astype(np.float32).reshape(shape) for tap, weight in zip(taps, weights, strict=True))
    return resized


def _inner(x: Array) -> Array:
    """The weight of a neighbour at a distance up to 1."""
    weight: Array = ((_A + 2) * x - (_A + 3)) * x * x + 1
    return weight


def _outer(x: Array) -> Array:
    """The weight of a neighbour at a distance from 1 to 2."""
    weight: Array = ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A
    return weight
